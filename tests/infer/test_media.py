"""Prompts with media: greedy answers equal those of transformers' generate, in a batch of prompts of all kinds."""

from __future__ import annotations

import inspect
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from tests.data import recordings
from tests.data.processors import PROCESSORS
from tests.harness import run_ranks
from tests.infer.models import ONE, infer_config, open_model
from tests.model.test_media import CONFIGS, build
from tests.train.runs import QUICKSTART
from tutti.attention.kv_cache import CACHED
from tutti.cli import main
from tutti.config.load import from_dict
from tutti.infer.generate import CachedLogits, Generator, Request
from tutti.infer.hf_generate import GeneratedLogits
from tutti.infer.load import load_model
from tutti.infer.media import MediaInputs, encoded_once
from tutti.infer.prompts import row_request
from tutti.infer.run import InferenceJob, infer
from tutti.infer.sampling import Sampler
from tutti.model.structure import read_structure

NEW = 20
PICTURES = [json.loads(line)["image"] for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:9]]


def write_model(folder: Path, family: str) -> str:
    """A random model of `family` with its processor; its path."""
    processor = PROCESSORS[family]()
    model = build(family, processor)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2)
    model.save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    return str(folder)


def make_pictures(folder: Path) -> list[dict[str, Any]]:
    """Rows about no, one, two and three images of several sizes, in files in `folder`."""
    sizes = [(40, 28), (64, 20), (24, 24), (30, 50), (48, 36), (28, 28)]
    for number, (size, name) in enumerate(zip(sizes, PICTURES, strict=False)):
        Image.open(QUICKSTART / name).convert("RGB").resize(size).save(folder / f"{number}.png")
    rows, used = [], 0
    for number, count in enumerate((1, 0, 2, 3)):
        text = "<image>" * count + "What do you see?" + " And where?" * number
        names = [f"{place}.png" for place in range(used, used + count)]
        used += count
        rows.append({"messages": [{"role": "user", "content": text}]} | ({"images": names} if names else {}))
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"), "qwen2_5_vl")


def requests_of(loaded: Any, rows: list[dict[str, Any]], folder: Path, limit: int = NEW) -> list[Request]:
    form = replace(loaded.form, context=None)
    return [row_request(form, row, number, limit, str(folder)) for number, row in enumerate(rows)]


def answers(loaded: Any, config: Any, requests: list[Request], *, batch_tokens: int = 10_000) -> list[list[int]]:
    generator = Generator(
        loaded.logits, Sampler.of(config.infer), frozenset(), ONE, batch_tokens, drawing=loaded.drawing
    )
    made: list[list[int]] = [[] for _ in requests]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return made


def by_transformers(
    path: str, family: str, rows: list[dict[str, Any]], folder: Path
) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits after each prompt and the answers of the original class, to each row alone as its own processor makes
    inputs of it."""
    processor = PROCESSORS[family]()
    model: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    first, made = [], []
    for row in rows:
        names = row.get("images", [])
        text = row["messages"][0]["content"].replace("<image>", "")
        parts = [{"type": "image"}] * len(names) + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": parts}]
        prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        images = [Image.open(folder / name).convert("RGB") for name in names]
        nested = [images] if images else None  # of one prompt, since some families depend on its number of images
        inputs = processor(text=[prompt], images=nested, return_tensors="pt", add_special_tokens=False)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        first.append(out.logits[0][0])
        made.append(out.sequences[0, inputs["input_ids"].shape[1] :].tolist())
    return first, made


@pytest.mark.parametrize("family", CONFIGS)
def test_greedy_equals_generate(tmp_path: Path, family: str) -> None:
    path, rows = write_model(tmp_path, family), make_pictures(tmp_path)
    config, loaded = open_model(path, do_sample=False)
    assert isinstance(loaded.logits, CachedLogits)
    assert loaded.model.config.get_text_config()._attn_implementation == CACHED
    requests = requests_of(loaded, rows, tmp_path)
    first, made = by_transformers(path, family, rows, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits.start(requests), torch.stack(first), rtol=1e-4, atol=1e-4)
    loaded.logits.keep([])
    together = answers(loaded, config, requests)
    assert together == made
    assert len({tuple(answer) for answer in together}) >= 2, "the answers are to differ, or this shows little"
    # One by one, and joining sequences that are being generated.
    assert answers(loaded, config, requests, batch_tokens=1) == together
    assert answers(loaded, config, requests, batch_tokens=300) == together


def test_media_are_encoded_once(tmp_path: Path, model: str) -> None:
    config, loaded = open_model(model, do_sample=False)
    runs: list[int] = []
    loaded.model.model.visual.register_forward_hook(lambda *_: runs.append(1))
    answers(loaded, config, requests_of(loaded, make_pictures(tmp_path), tmp_path))
    assert len(runs) == 1


def test_transformers_generate_is_given_the_media(tmp_path: Path) -> None:
    path, rows = write_model(tmp_path, "qwen2_vl"), make_pictures(tmp_path)
    rows.append(rows[0] | {"images": ["5.png"]})  # of as many tokens as the first, perhaps: then they run together
    (tmp_path / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    config, loaded = open_model(path, do_sample=False)
    assert isinstance(loaded.logits, GeneratedLogits)
    made = by_transformers(path, "qwen2_vl", rows, tmp_path)[1]
    assert answers(loaded, config, requests_of(loaded, rows, tmp_path)) == made


def infer_on_rank(path: str, source: str, output: str) -> None:
    infer(infer_config(path, max_tokens=8, do_sample=False), InferenceJob((), source, output))


def test_ranks_and_ways_to_ask_give_the_same(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_pictures(tmp_path)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outputs = []
    for world in (1, 2):
        output = tmp_path / f"out{world}.jsonl"
        run_ranks(world, infer_on_rank, model, str(source), str(output))
        outputs.append([json.loads(line)["response"] for line in output.read_text().splitlines()])
    assert outputs[0] == outputs[1]
    settings = [f"--infer.model_path={model}", "--infer.max_tokens=8", "--infer.do_sample=false"]
    (question,) = (rows[2]["messages"][0]["content"].replace("<image>", ""),)
    pictures = [str(tmp_path / name) for name in rows[2]["images"]]
    capsys.readouterr()
    given = [word for name in pictures for word in ("--image", name)]
    assert main(["infer", *settings, *given, "--prompt", question]) == 0
    assert capsys.readouterr().out.rstrip("\n") == outputs[0][2].rstrip("\n")
    lines = [f"/image {pictures[0]}", "/image nowhere.png", f"/audio {pictures[0]}", f"/image {source}"]
    lines += [f"/image '{pictures[1]}'", "<|image_pad|>?", question]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["infer", *settings]) == 0
    shown = capsys.readouterr().out
    assert "(not taken: has audio, which " in shown and f"(not taken: {source.name} is not an image" in shown
    assert "(not sent: the text has " in shown, "what comes before a message waits for the next one"
    assert "(there is no file nowhere.png)" in shown and shown.rstrip("\n").endswith(outputs[0][2].rstrip("\n"))


def test_a_part_that_knows_no_sdpa_attends_by_its_own_code(tmp_path: Path) -> None:
    _, loaded = open_model(write_model(tmp_path, "gemma4"))
    config = loaded.model.config
    parts = (config.get_text_config(), config.vision_config, config.audio_config)
    assert isinstance(loaded.logits, GeneratedLogits)
    assert [part._attn_implementation for part in parts] == ["sdpa", "sdpa", "eager"]


def test_what_a_conversation_has_no_room_for_is_not_taken(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise no message could be sent any more, because accepted media wait for the next message."""
    make_pictures(tmp_path)
    pictures = [f"/image {tmp_path / '1.png'}"] * 40
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*pictures, "What?", ""])))
    assert main(["infer", f"--infer.model_path={model}", "--infer.max_tokens=3"]) == 0
    shown = capsys.readouterr().out
    assert "(not taken: with it a message has 2" in shown and "tokens, and the model's context 256)" in shown
    assert "(1.png comes before the next message)" in shown and "not sent" not in shown


def test_what_cannot_be_asked_is_one_line(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["infer", f"--infer.model_path={model}", *words]) > 0
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "broken.png").write_bytes(b"no picture")
    broken = str(tmp_path / "broken.png")
    assert "--image: there is no file nowhere.png" in refused("--image", "nowhere.png", "--prompt", "x")
    assert "--prompt 1: broken.png is not an image" in refused("--image", broken, "--prompt", "x")
    assert "--prompt 1: the text has 1 places for images" in refused("--prompt", "<|image_pad|>?")
    assert "--video: " in refused("--video", "nowhere.mp4", "--prompt", "x")
    both = refused("--image", broken, "--input", "a", "--output", "b")
    assert "--image: goes with --prompt or a conversation; rows name their own media" in both
    row = {"messages": [{"role": "user", "content": "<image>?"}], "images": ["https://example.com/a.png"]}
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    asked = refused("--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"))
    assert f"{tmp_path / 'in.jsonl'}:1: https://example.com/a.png would have to be downloaded" in asked


def test_rows_of_a_table_and_bounds_on_pixels(tmp_path: Path, model: str) -> None:
    """data.row_template and data.image_max_pixels mean what they mean in training."""
    make_pictures(tmp_path)
    data = {"row_template": {"user": "<image>What is this?", "assistant": "{caption}"}, "image_max_pixels": 256}
    lengths = []
    for settings in ({}, data):
        tree = {"infer": {"model_path": model}, "data": settings | {"row_template": data["row_template"]}}
        loaded = load_model(from_dict(tree), ONE)
        (request,) = requests_of(loaded, [{"image": "4.png"}], tmp_path)
        lengths.append(len(request.ids))
    assert lengths[1] < lengths[0]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm", "qwen2_audio", "qwen2_5_omni"])
def test_videos_and_sounds_are_asked_about(tmp_path: Path, family: str) -> None:
    """Inputs equal those of training, which are tested there; answers equal those of the original class."""
    (tmp_path / "long.mp4").write_bytes(recordings.video(12, 4))
    (tmp_path / "long.wav").write_bytes(recordings.sound(1.7))
    (tmp_path / "short.wav").write_bytes(recordings.sound(0.4, seed=1))
    path = write_model(tmp_path, family)
    config, loaded = open_model(path, do_sample=False)
    rows: list[dict[str, Any]] = [{"prompt": "Nothing?"}]
    if "audio" not in family:
        rows.append({"prompt": "<video>What moves?", "videos": ["long.mp4"]})
    if family in ("qwen2_audio", "qwen2_5_omni"):
        rows.append({"prompt": "<audio>, then <audio>: what is louder?", "audios": ["long.wav", "short.wav"]})
    requests = requests_of(loaded, rows, tmp_path)
    inputs = MediaInputs(loaded.form.media)
    model: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    made = []
    for request in requests:
        values = inputs.stacked([(request.ids, request.media)])
        if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
            values.pop("mm_token_type_ids", None)
        ids = torch.tensor([list(request.ids)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), **values, do_sample=False, max_new_tokens=NEW, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        made.append(out[0, ids.shape[1] :].tolist())
    assert answers(loaded, config, requests) == made


def test_a_video_is_asked_about_with_its_sound(tmp_path: Path) -> None:
    (tmp_path / "heard.mp4").write_bytes(recordings.video(12, 4, sound=True))
    path = write_model(tmp_path, "qwen2_5_omni")
    config = from_dict({"infer": {"model_path": path, "do_sample": False, "max_tokens": 4},
                        "data": {"audio_in_video": True, "video_max_frames": 2, "video_max_pixels": 400}})  # fmt: skip
    loaded = load_model(config, ONE)
    (request,) = requests_of(loaded, [{"prompt": "<video>What moves?", "videos": ["heard.mp4"]}], tmp_path, 4)
    assert request.media[0].sound
    model: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    values = MediaInputs(loaded.form.media).stacked([(request.ids, request.media)])
    values.pop("mm_token_type_ids", None)
    ids = torch.tensor([list(request.ids)])
    options: dict[str, Any] = {"max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **values, **options, use_audio_in_video=True)
    want = [out[0, ids.shape[1] :].tolist()]
    assert answers(loaded, config, [request]) == want
    loaded.model.set_attn_implementation("eager")
    generated = replace(loaded, logits=GeneratedLogits(loaded.model, frozenset(), MediaInputs(loaded.form.media)))
    assert answers(generated, config, [request]) == want


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "gemma3"])
def test_features_are_computed_once_where_rows_are_run_anew(tmp_path: Path, family: str) -> None:
    _, loaded = open_model(write_model(tmp_path, family), do_sample=False)
    decoder: Any = read_structure(loaded.model).decoder
    requests = requests_of(loaded, make_pictures(tmp_path), tmp_path)
    inputs = MediaInputs(loaded.form.media)
    values = [inputs.stacked([(item.ids, item.media)])["pixel_values"] for item in (requests[0], requests[2])]
    grids = [inputs.stacked([(item.ids, item.media)]).get("image_grid_thw") for item in (requests[0], requests[2])]
    arguments = [({} if grid is None else {"image_grid_thw": grid}) for grid in grids]
    runs: list[int] = []
    read_structure(loaded.model).towers[0].register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad(), encoded_once(decoder):
        first = decoder.get_image_features(values[0], **arguments[0]).pooler_output
        again = decoder.get_image_features(values[0].clone(), **arguments[0]).pooler_output
        other = decoder.get_image_features(values[1], **arguments[1]).pooler_output
    assert len(runs) == 2 and "get_image_features" not in vars(decoder)
    assert all(one.equal(two) for one, two in zip(first, again, strict=True))
    assert sum(map(len, other)) != sum(map(len, first))
