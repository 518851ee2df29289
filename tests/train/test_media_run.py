"""Complete runs of a model with image input, on one file with pictures and text-only chats."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tests.data.processors import PROCESSORS
from tests.harness import run_ranks
from tests.model.test_media import build
from tests.train.runs import QUICKSTART, records, run, tiny_config
from tests.train.test_run import assert_same_training
from tutti.config.load import from_dict
from tutti.core.dist import World
from tutti.data.loader import build_data
from tutti.infer.generate import Generator, whole_answers
from tutti.infer.load import load_model
from tutti.infer.prompts import row_request
from tutti.infer.sampling import Sampler

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def write_model(folder: Path, family: str) -> str:
    processor = PROCESSORS[family]()
    build(family, processor)[0].save_pretrained(folder)
    processor.chat_template = processor.tokenizer.chat_template
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("vlm"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pictures with captions, pairs of pictures, and chats without any."""
    pictures = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]]
    lines: list[dict[str, Any]] = [{"image": one["image"], "caption": one["caption"]} for one in pictures]
    for first, second in zip(pictures[::4], pictures[1::4], strict=True):
        chat = [{"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": "Two pictures."}]
        lines.append({"messages": chat, "images": [first["image"], second["image"]]})
    lines += [json.loads(line) for line in (QUICKSTART / "chat.jsonl").read_text().splitlines()[:10]]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def config_of(folder: Path, model: str, rows: str, *, world: int = 1, **changes: Any) -> Any:
    values = {
        "model.model_path": model, "model.tokenizer_path": model, "data.train_path": rows, "data.max_seq_len": 256,
        "data.media_root": str(QUICKSTART), "train.lr": 1e-3, "train.max_steps": 3,
        "data.row_template": {"user": "<image>What is this?", "assistant": "{caption}"},
    }  # fmt: skip
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: str, rows: str) -> list[dict[str, Any]]:
    return run(config_of(tmp_path_factory.mktemp("reference"), model, rows))


@pytest.mark.parametrize(
    "layout",
    [{"data_parallel_mode": "fsdp2"}, {"ulysses_parallel_size": 2}, {"data_parallel_mode": "ddp"}],
    ids=("fsdp2", "ulysses", "ddp"),
)
def test_layouts_equal_one_process(
    tmp_path: Path, model: str, rows: str, reference: list[dict[str, Any]], layout: dict[str, Any]
) -> None:
    sizes = {f"train.{name}": value for name, value in layout.items()}
    assert_same_training(run(config_of(tmp_path, model, rows, world=2, **sizes), 2), reference)


def test_what_is_lost_to_broken_images_is_not_divided_by(tmp_path: Path, model: str) -> None:
    for number in range(8):
        buffer = io.BytesIO()
        Image.effect_noise((90 + 8 * number, 90), 90).save(buffer, "JPEG")
        data = buffer.getvalue()
        (tmp_path / f"{number}.jpg").write_bytes(data[: len(data) // 2] if number in (2, 5) else data)
    lines = [{"image": f"{number}.jpg", "caption": f"Number {number}." * (1 + number)} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = {
        "data.silent_exception": True, "data.media_root": None, "data.shuffle": False, "train.dyn_bsz": False,
        "train.global_batch_size": 4, "train.max_steps": None,
    }  # fmt: skip
    alone, two = (
        run(config_of(tmp_path / str(world), model, str(tmp_path / "rows.jsonl"), world=world, **options), world)
        for world in (1, 2)
    )
    assert_same_training(two, alone)
    assert [one["trained_tokens"] for one in two] == [one["trained_tokens"] for one in alone] and len(alone) == 2


def batches(config: Any, model: str) -> list[Any]:
    processor = AutoProcessor.from_pretrained(model)
    data = build_data(config, processor.tokenizer, world=ALONE, dp_rank=0, dp_size=1, vocab_size=4096,
                      processor=processor)  # fmt: skip
    assert data.has_media
    return [micro for step in data.train() for micro in step.micro_batches]


def test_workers_decode_what_this_process_would(tmp_path: Path, model: str, rows: str) -> None:
    here, there = (
        batches(config_of(tmp_path, model, rows, **{"data.num_workers": number}), model) for number in (0, 2)
    )
    assert any("pixel_values" in batch.extras for batch in here)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.input_ids.equal(theirs.input_ids) and ours.extras.keys() == theirs.extras.keys()
        assert all(ours.extras[name].equal(theirs.extras[name]) for name in ours.extras)


def test_streams_have_media_too(tmp_path: Path, model: str, rows: str) -> None:
    options = {"data.datasets_type": "iterable", "data.shuffle": False, "data.train_size": 6000}
    lines = run(config_of(tmp_path, model, rows, **options))
    assert all(line["loss"] > 0 for line in lines) and lines[-1]["loss"] < lines[0]["loss"]


def test_the_export_has_the_processor_and_what_is_frozen_stays(tmp_path: Path, model: str, rows: str) -> None:
    options = {"train.save_hf_weights": True, "train.freeze": ["towers"]}
    run(config_of(tmp_path, model, rows, **options))
    folder = tmp_path / "out" / "hf" / "final"
    assert type(AutoProcessor.from_pretrained(folder)).__name__ == "Qwen2_5_VLProcessor"
    before = AutoModelForMultimodalLM.from_pretrained(model).state_dict()
    after = AutoModelForMultimodalLM.from_pretrained(folder).state_dict()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert any("merger" in name for name in moved) and any("language_model" in name for name in moved)
    assert not any("visual.blocks" in name for name in moved)


def test_ranks_and_a_restart_keep_the_rates_of_parts(tmp_path: Path, model: str, rows: str) -> None:
    options = {"train.lr_decay_style": "constant", "train.save_steps": 2}
    parts = options | {"train.part_lr": {"towers": 1e-4, "*embed_tokens*": 5e-3}}
    alone = run(config_of(tmp_path / "alone", model, rows, **parts))
    plain = run(config_of(tmp_path / "plain", model, rows, **options))
    assert [line["lr"] for line in alone] == [line["lr"] for line in plain]
    assert alone[-1]["loss"] != plain[-1]["loss"]
    run(config_of(tmp_path / "two", model, rows, world=2, **parts | {"train.max_steps": 2}), 2)
    again = config_of(tmp_path / "two", model, rows, **parts, **{"train.load_checkpoint_path": "auto"})
    run(again)
    assert_same_training(records(again), alone)


def prompt_logits(path: str | Path, row: dict[str, Any]) -> torch.Tensor:
    """The logits [V] after a prompt by the model at `path`, as `tutti infer` loads it."""
    data = {"media_root": str(QUICKSTART)}
    loaded = load_model(from_dict({"infer": {"model_path": str(path)}, "data": data}), ALONE)
    with torch.no_grad():
        return loaded.logits.start([row_request(loaded.form, row, 0, 1, str(QUICKSTART))])[0]


def own_logits(model: Any, folder: str | Path, row: dict[str, Any]) -> torch.Tensor:
    """The loss by transformers' classes, with the processor in `folder`."""
    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    picture = Image.open(QUICKSTART / row["image"]).convert("RGB")
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


@pytest.mark.parametrize("adapted", ["all weights", "language model", "tower too"])
def test_what_is_exported_is_read_by_others(tmp_path: Path, model: str, rows: str, adapted: str) -> None:
    picture = json.loads((QUICKSTART / "images.jsonl").read_text().splitlines()[3])["image"]
    row = {"prompt": "What is this?", "image": picture}
    options: dict[str, Any] = {"train.save_hf_weights": True, "train.save_steps": 1, "train.lr": 1e-2}
    if adapted != "all weights":
        options |= {"train.architecture": "lora"}
    if adapted == "tower too":
        options |= {"train.lora_targets": ["q_proj", "visual.blocks.*.attn.qkv"]}
    run(config_of(tmp_path, model, rows, **options))
    final = tmp_path / "out" / "hf" / "final"
    base = AutoModelForMultimodalLM.from_pretrained(model).eval()
    if adapted == "all weights":
        theirs: Any = AutoModelForMultimodalLM.from_pretrained(final).eval()
    else:
        peft = pytest.importorskip("peft")
        config = json.loads((final / "adapter_config.json").read_text())
        assert ("qkv" in config["target_modules"]) == (adapted == "tower too"), config["target_modules"]
        theirs = peft.PeftModel.from_pretrained(base, final).eval()
    want = own_logits(theirs, final, row)
    assert not torch.allclose(want, own_logits(AutoModelForMultimodalLM.from_pretrained(model).eval(), model, row))
    shutil.move(tmp_path / "out" / "hf", tmp_path)
    for path in (tmp_path / "hf" / "final", tmp_path / "out"):  # the export, and the newest checkpoint
        torch.testing.assert_close(prompt_logits(path, row), want, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captions of pictures preferred to others' captions, by text or parts, and pairs of text alone."""
    pictures = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]]
    lines: list[dict[str, Any]] = []
    for number, (one, other) in enumerate(zip(pictures, pictures[1:] + pictures[:1], strict=True)):
        answers = {"chosen": one["caption"], "rejected": f"No, {other['caption']}"}
        if number % 3 == 0:
            lines.append({"prompt": "<image> and <image>?", "images": [one["image"], other["image"]], **answers})
        elif number % 3 == 1:
            parts = [{"type": "image", "path": one["image"]}, {"type": "text", "text": "What is this?"}]
            lines.append({"prompt": [{"role": "user", "content": parts}], **answers})
        else:
            lines.append({"prompt": "Say a word.", **answers})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize(("task", "family"), [("dpo", "qwen2_5_vl"), ("reward", "gemma3")])
def test_pairs_of_answers_about_images_are_compared(tmp_path: Path, pairs: str, task: str, family: str) -> None:
    model = write_model(tmp_path / "model", family)
    options = {
        "data.data_type": task,
        "data.row_template": {},
        "data.image_max_pixels": 1024,
        "train.global_batch_size": 4,
    }
    alone = run(config_of(tmp_path / "alone", model, pairs, **options))
    for layout in ({"data_parallel_mode": "fsdp2"}, {"ulysses_parallel_size": 2}):
        sizes = {f"train.{name}": value for name, value in layout.items()}
        folder = tmp_path / next(iter(layout))
        assert_same_training(run(config_of(folder, model, pairs, world=2, **options, **sizes), 2), alone)


def test_prompts_with_images_are_answered_alike_on_every_layout(tmp_path: Path, model: str, rows: str) -> None:
    pictures = [json.loads(line)["image"] for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:3]]
    parts = [{"type": "image", "path": pictures[1]}, {"type": "text", "text": " or "}, {"type": "image"}]
    asked: list[dict[str, Any]] = [
        {"image": pictures[0]},
        {"messages": [{"role": "user", "content": parts}], "images": pictures[2:]},
        {"prompt": "Who are you?"},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, asked)))
    options = {
        "train.sample_prompts_path": str(prompts), "train.sample_tokens": 6, "train.max_steps": 2, "train.lr": 5e-3,
        "data.eval_path": rows, "train.eval_steps": 1,
        "data.row_template": {"user": "<image>What is this?", "assistant": "{caption}"},
    }  # fmt: skip
    layouts = [{}, {"data_parallel_mode": "fsdp2"}, {"ulysses_parallel_size": 2}]
    found = []
    for number, layout in enumerate(layouts):
        sizes = {f"train.{name}": value for name, value in layout.items()} | {"train.save_hf_weights": not layout}
        config = config_of(tmp_path / str(number), model, rows, world=1 + bool(layout), **options, **sizes)
        run(config, 1 + bool(layout))
        shown = json.loads((Path(config.train.output_dir) / "run.json").read_text())
        found.append([(text["step"], text["prompt"], text["text"]) for text in shown["texts"]])
    assert found[0] == found[1] == found[2]
    assert [prompt for step, prompt, _ in found[0] if step == 2] == [
        "<image>What is this?", "<image> or <image>", "Who are you?",
    ]  # fmt: skip
    seen = [[shown["pictures"][key] for key in text.get("pictures", [])] for text in shown["texts"][-3:]]
    assert [len(urls) for urls in seen] == [1, 2, 0] and len(shown["pictures"]) == 3
    small = Image.open(io.BytesIO(base64.b64decode(seen[0][0].removeprefix("data:image/png;base64,"))))
    assert max(small.size) == 96
    report = (Path(config.train.output_dir) / "report.html").read_text()
    assert seen[1][1] in report and len(report) < 1_000_000
    folder = tmp_path / "0" / "out" / "hf" / "final"
    asked_again = from_dict({
        "infer": {"model_path": str(folder), "do_sample": False, "max_tokens": 6},
        "data": {"row_template": options["data.row_template"], "media_root": str(QUICKSTART)},
    })  # fmt: skip
    loaded = load_model(asked_again, ALONE)
    generator = Generator(loaded.logits, Sampler.of(asked_again.infer), loaded.stop_ids, ALONE, 4096)
    requests = [row_request(loaded.form, row, number, 6, str(tmp_path)) for number, row in enumerate(asked)]
    answers = dict(whole_answers(generator.stream(requests), requests, loaded.form.tokenizer))
    assert [answers[number] for number in range(3)] == [text for step, _, text in found[0] if step == 2]


BAD = {
    "missing": ({"image": "images/none.webp", "caption": "x"}, "images/none.webp is not a file below"),
    "two places": ({"messages": [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "x"}],
                    "images": ["a"]}, "more places for images than the 1"),
    "too long": ({"image": "images/1f3a0.webp", "caption": "x"}, r"only text can be cut.*data\.image_max_pixels"),
    "no column": ({"image": "images/1f3a0.webp"}, "has no column caption"),
    "a marker in a text": ({"messages": [{"role": "user", "content": "<|image_pad|>?"},
                                         {"role": "assistant", "content": "x"}]},
                           "the text has 1 places for images, and the row has 0"),
    "video": ({"messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "x"}],
               "video": "a.mp4"}, "a.mp4 is not a file below"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_one_line_with_file_and_line(tmp_path: Path, model: str, name: str) -> None:
    row, reason = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    length = 40 if name == "too long" else 256
    with pytest.raises(AssertionError, match=rf"rows\.jsonl, line 1: .*{reason}"):
        run_ranks(1, checked, config_of(tmp_path, model, str(path), **{"data.max_seq_len": length}))


def checked(config: Any) -> None:
    from tutti.train.run import train

    train(config)
