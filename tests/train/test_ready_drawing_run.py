"""Complete runs of Janus that draw: layouts, exports, unchanged parts, and pictures equal to transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tests.data.processors import PROCESSORS
from tests.harness import run_ranks
from tests.infer.models import ONE, open_model
from tests.model.drawers import drawer_config, drawing_rows, write_drawer
from tests.train.runs import QUICKSTART, run, train_quietly
from tests.train.test_run import assert_same_training
from tutti.config import Config, InferConfig
from tutti.config.load import from_dict
from tutti.core.pixels import to_image
from tutti.data.rows import RowError
from tutti.infer.drawing import PictureCollector, hiding
from tutti.infer.generate import Generator, Request, Token
from tutti.infer.load import load_model
from tutti.infer.prompts import row_request, to_draw
from tutti.infer.run import InferenceJob, infer
from tutti.infer.sampling import Sampler
from tutti.kinds import language
from tutti.model.omni_processor import CODE
from tutti.model.structure import read_structure
from tutti.train.inputs import open_data
from tutti.train.tasks import draw_codes as task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_drawer(tmp_path_factory.mktemp("janus"))


def test_codes_of_the_vocabulary_are_split_among_tensor_ranks(tmp_path: Path) -> None:
    path = write_drawer(tmp_path / "emu3", "emu3")
    changes = {"data.image_max_pixels": 64, "train.lr": 1e-3}
    got = run(drawer_config(tmp_path / "two", path, world=2, **changes, **{"train.tensor_parallel_size": 2}), 2)
    assert_same_training(got, run(drawer_config(tmp_path / "one", path, **changes)))


def exported(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    train_quietly(drawer_config(folder, model, **{"train.save_hf_weights": True}))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """The folder of a run in one process."""
    folder = tmp_path_factory.mktemp("one")
    run_ranks(1, exported, folder, model)
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(tmp_path: Path, model: str, one: Path, layout: str) -> None:
    config = drawer_config(tmp_path, model, world=2, **{"train.data_parallel_mode": layout})
    assert_same_training(run(config, 2), lines(one))
    assert lines(one)[0]["targets/code"] > 0


def test_an_export_is_the_plain_folder_that_it_was(model: str, one: Path) -> None:
    folder = one / "out" / "hf" / "final"
    before, after = load_file(Path(model) / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name, tensor in before.items() if tensor.equal(after[name])}
    assert same == {name for name in before if ".vqmodel." in name}
    loaded = AutoModelForMultimodalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "JanusForConditionalGeneration"
    processor, own = AutoProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(model)
    assert processor.tokenizer.get_vocab() == own.tokenizer.get_vocab() and CODE not in processor.tokenizer.get_vocab()
    assert processor.tokenizer.chat_template == own.tokenizer.chat_template


@pytest.mark.parametrize("family", ["emu3", "chameleon"])
def test_models_with_codes_in_their_vocabulary_train_and_are_exported(tmp_path: Path, family: str) -> None:
    path = write_drawer(tmp_path / "model", family)
    changes = {"data.image_max_pixels": 64, "train.save_hf_weights": True, "train.cfg_dropout": 0.5}
    made = run(drawer_config(tmp_path, path, **changes, **{"model.encode_target": family == "emu3"}))
    assert made[0]["targets/code"] > 0 and made[0]["loss/code"] > 0
    folder = tmp_path / "out" / "hf" / "final"
    before, after = load_file(Path(path) / "model.safetensors"), load_file(folder / "model.safetensors")
    same = {name for name, tensor in before.items() if tensor.equal(after[name])}
    assert before.keys() == after.keys() and same == {name for name in before if "vqmodel." in name}
    assert type(AutoModelForMultimodalLM.from_pretrained(folder)).__name__.lower().startswith(family)
    assert CODE not in AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()


def without_tokenizer(config: Config) -> None:
    """Train where there is no tokenizer of pictures."""
    torch.set_num_threads(1)
    task.PictureTokenizer = None  # type: ignore[assignment,misc]
    train_quietly(config)


def test_what_is_for_codes_stays_where_the_data_has_none(tmp_path: Path, model: str) -> None:
    rows = [row for row in drawing_rows() if "<image>" in row["messages"][0]["content"]] * 4
    config = drawer_config(tmp_path, model, **{"train.weight_decay": 0.5, "train.save_hf_weights": True})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ranks(1, without_tokenizer, config)
    made = lines(tmp_path)
    assert made[-1]["targets/code"] == 0
    before = load_file(Path(model) / "model.safetensors")
    after = load_file(tmp_path / "out" / "hf" / "final" / "model.safetensors")
    assert all(after[name].equal(tensor) for name, tensor in before.items() if ".generation_" in name)
    assert not after["lm_head.weight"].equal(before["lm_head.weight"])


def drawn(loaded: Any, config: Config, requests: list[Request]) -> list[list[int]]:
    """The tokens of the answers, those of pictures among them."""
    sampler = Sampler.of(config.infer)
    generator = Generator(loaded.logits, sampler, frozenset(), ONE, 10_000, drawing=loaded.drawing)
    made: list[list[int]] = [[] for _ in requests]
    for token in generator.stream(requests):
        made[token.number].append(token.id)
    return made


def requests_to_draw(loaded: Any) -> list[Request]:
    rows = [{"prompt": f"Draw: {name}"} for name in "ab"]
    return [to_draw(loaded.form, row_request(loaded.form, row, place, 40, "/")) for place, row in enumerate(rows)]


def test_pictures_are_those_that_transformers_draws(model: str) -> None:
    config, loaded = open_model(model, do_sample=False, image_guidance=5.0)
    assert loaded.drawing is not None
    requests = requests_to_draw(loaded)
    made = [[token - loaded.drawing.first for token in answer[:16]] for answer in drawn(loaded, config, requests)]
    plain: Any = AutoModelForMultimodalLM.from_pretrained(model, attn_implementation="eager").eval()
    plain.generation_config.generation_kwargs = {"boi_token_id": loaded.drawing.start}
    settings = {"do_sample": False, "guidance_scale": 5.0, "bos_token_id": -1, "generation_mode": "image"}
    settings["pad_token_id"] = loaded.form.tokenizer.pad_token_id
    for request, ours in zip(requests, made, strict=True):
        ids = torch.tensor([request.ids])
        theirs = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert ours == theirs[0].tolist()
    assert len(set(made[0])) > 2 and made[0] != made[1]


def test_emu3_writes_the_size_and_the_rows_of_a_picture(tmp_path: Path) -> None:
    path = write_drawer(tmp_path, "emu3")
    asked = {"model_path": path, "do_sample": False, "image_guidance": 3.0}
    config = from_dict({"infer": asked, "data": {"image_max_pixels": 64}})
    loaded = load_model(config, ONE)
    drawing, tokenizer = loaded.drawing, loaded.form.tokenizer
    assert drawing is not None and tokenizer.decode(drawing.begins) == "<|image start|>4*4<|image token|>"
    end = tokenizer.convert_tokens_to_ids(["<|extra_200|>", "<|extra_201|>", "<|image end|>"])
    requests = requests_to_draw(loaded)
    plain: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    hide = hiding(tokenizer, loaded.model)
    for request, ours in zip(requests, drawn(loaded, config, requests), strict=True):
        begin = len(request.ids)
        number = begin - len(drawing.begins)

        def allowed(_: int, ids: torch.Tensor, begin: int = begin) -> list[int]:
            place = len(ids) - begin
            if place >= 20:
                return end[place - 19 : place - 18]
            return end[:1] if place % 5 == 4 else list(range(drawing.first, drawing.first + 16))

        twin = torch.tensor([[*hide(request.ids[:number]), *request.ids[number:]]])
        theirs = plain.generate(
            input_ids=torch.tensor([request.ids]), negative_prompt_ids=twin, guidance_scale=3.0, do_sample=False,
            max_new_tokens=22, eos_token_id=None, prefix_allowed_tokens_fn=allowed,
        )  # fmt: skip
        assert ours[:22] == theirs[0, begin:].tolist()
        with torch.no_grad():
            image = plain.decode_image_tokens(image_tokens=torch.tensor([ours[:20] + [0] * 3]), height=4, width=4)
        pictures = PictureCollector(drawing)
        assert [token.id for token in pictures.watch(Token(0, token, None) for token in ours[:23])] == ours[21:23]
        assert pictures.found[0][0].tobytes() == to_image(image[0]).tobytes()


def test_chameleon_sees_pictures_as_codes_and_draws_none(tmp_path: Path) -> None:
    path = write_drawer(tmp_path, "chameleon")
    config, loaded = open_model(path, do_sample=False)
    image, text = drawing_rows()[0]["image"], "What do you see?"
    row = {"messages": [{"role": "user", "content": f"<image>{text}"}], "image": image}
    request = row_request(loaded.form, row, 0, 8, str(QUICKSTART))
    plain: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    processor = PROCESSORS["chameleon"]()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    picture = Image.open(QUICKSTART / image).convert("RGB")
    inputs = processor(text=[prompt], images=[picture], return_tensors="pt", return_for_text_completion=True)
    theirs = plain.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert drawn(loaded, config, [request])[0] == theirs[0, len(request.ids) :].tolist()
    with pytest.raises(RowError, match="makes codes of pictures, and no pictures of codes"):
        to_draw(loaded.form, request)


def answered(folder: Path) -> None:
    torch.set_num_threads(1)
    (folder / "ask.jsonl").write_text('{"prompt": "Draw: dog"}\n')
    settings = InferConfig(model_path=str(folder / "out"), max_tokens=8, image_guidance=2.0, seed=3)
    infer(
        Config(infer=settings),
        InferenceJob(input=str(folder / "ask.jsonl"), output=str(folder / "answers.jsonl"), draw=True),
    )


def test_a_trained_model_draws(one: Path) -> None:
    run_ranks(1, answered, one)
    (row,) = [json.loads(line) for line in (one / "answers.jsonl").read_text().splitlines()]
    assert Image.open(one / row["pictures"][0]["path"]).size == (16, 16)


def test_the_largest_micro_batch_is_found_where_no_step_ends_in_the_first_epoch(tmp_path: Path, model: str) -> None:
    """Rows with input pictures and rows with drawn pictures both count as media."""
    config = drawer_config(tmp_path, model)
    tokenizer, built = language.build(config, torch.device("cpu"))
    inputs = language.read_inputs(config, tokenizer, read_structure(built))
    samples = open_data(config, inputs, built, ONE, 0, 1).largest()
    assert {medium.kind for sample in samples for medium in sample.media} == {"image", "drawn"}


REFUSED = {
    "codes for eyes": ({"model.input_encoder": "decoder"}, "model.input_encoder: a ready-made model"),
    "features": ({"model.output_encoder": "encoder"}, "model.output_encoder: "),
    "codes of streams": ({"data.datasets_type": "iterable", "model.encode_target": True}, "goes over the data"),
    "split matrices": (
        {"train.tensor_parallel_size": 2, "train.cfg_dropout": 0.1},
        "with train.tensor_parallel_size 2 this",
    ),
    "stages": (
        {"train.pipeline_parallel_size": 2, "train.cfg_dropout": 0.1},
        "with train.pipeline_parallel_size 2 this",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, model: str, case: str) -> None:
    changes, message = REFUSED[case]
    config = drawer_config(
        tmp_path, model, world=2 if any("parallel_size" in name for name in changes) else 1, **changes
    )
    with pytest.raises(ValueError, match=message):
        language.build(config, torch.device("cpu"))
