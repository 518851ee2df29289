"""Models that draw: the assistant's pictures are trained as codes in any layout; parts are saved and exchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.harness import run_ranks
from tests.infer.models import ONE
from tests.model.composed import write_foundation, write_tower
from tests.model.drawers import write_drawer, write_emu3_vq
from tests.train.runs import QUICKSTART, run, tiny_config, train_quietly
from tests.train.tasks.test_reconstruction import write_net
from tests.train.test_run import assert_same_training
from tutti.checkpoint.omni_files import CODE_DECODER
from tutti.config import Config, ModelConfig
from tutti.infer.drawing import Hidden
from tutti.kinds import language
from tutti.model.autoencoder import make_net
from tutti.model.omni_config import decoder_folder, decoder_size
from tutti.model.structure import read_structure
from tutti.model.vq import WEIGHTS, PictureTokenizer, read_codes
from tutti.train.inputs import open_data


def write_tokenizer(folder: Path) -> str:
    """Write a random tokenizer of pictures of 8 pixels a side, of 16 codes each; its folder."""
    path = write_net(folder, "VQModel")
    torch.manual_seed(3)
    net = make_net(json.loads((Path(path) / "config.json").read_text()))
    torch.nn.init.normal_(net.quantize.embedding.weight)
    save_file(net.state_dict(), Path(path) / WEIGHTS)
    return path


def config_of(folder: Path, *, world: int = 1, **changes: Any) -> Config:
    """A Qwen3 that draws pictures from their captions, names pictures, and chats."""
    rows = [json.loads(line) for line in (QUICKSTART / "images.jsonl").read_text().splitlines()[:24]]
    lines = []
    for number, row in enumerate(rows):
        says = [f"Draw: {row['caption']}", "Here: <image>"] if number % 3 else ["<image>What?", row["caption"]]
        chat = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), says, strict=True)]
        lines.append(json.dumps({"messages": chat, "image": row["image"]}))
    folder.mkdir(parents=True, exist_ok=True)
    lines += (QUICKSTART / "chat.jsonl").read_text().splitlines()[:4]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    values = {
        "model.config_path": write_foundation(folder, "qwen3"),
        "model.decoders": {"image": {"model_path": write_tokenizer(folder)}},
        "model.encoders": {"image": {"config_path": write_tower(folder, "siglip")}},
        "data.train_path": str(folder / "rows.jsonl"),
        "data.media_root": str(QUICKSTART),
        "train.lr": 3e-3,
        "train.cfg_dropout": 0.3,
        "train.num_train_epochs": 2,
        "train.max_steps": 2,
    }
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of one process."""
    return run(config_of(tmp_path_factory.mktemp("one")))


def test_both_kinds_of_loss_are_told_of_and_fall(one: list[dict[str, Any]]) -> None:
    for kind in ("text", "code"):
        assert one[-1][f"loss/{kind}"] < one[0][f"loss/{kind}"] and one[0][f"targets/{kind}"] > 0
    assert one[0]["loss"] == pytest.approx(one[0]["loss/text"] + one[0]["loss/code"], rel=1e-5)


LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data_parallel_mode": "ddp"},
    "fsdp2, remat": {"data_parallel_mode": "fsdp2", "enable_gradient_checkpointing": True},
    "ulysses": {"ulysses_parallel_size": 2},
    "tensor": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one(tmp_path: Path, one: list[dict[str, Any]], layout: str) -> None:
    sizes = {f"train.{name}": value for name, value in LAYOUTS[layout].items()}
    assert_same_training(run(config_of(tmp_path, world=2, **sizes), 2), one)


def test_codes_that_are_made_before_training_are_those_of_each_step(tmp_path: Path, one: list[dict[str, Any]]) -> None:
    made = run(config_of(tmp_path, **{"model.encode_target": True}))
    assert [line["loss"] for line in made] == [line["loss"] for line in one]
    assert [line["grad_norm"] for line in made] == [line["grad_norm"] for line in one]


def exported(folder: Path, **changes: Any) -> None:
    torch.set_num_threads(1)
    train_quietly(config_of(folder, **{"train.save_steps": 1, "train.save_hf_weights": True}, **changes))


def resumed(folder: Path, start: str) -> None:
    exported(folder, **{"train.load_checkpoint_path": start})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.relative_to(folder)}: {name}": item
        for file in sorted(folder.rglob("*.safetensors"))
        for name, item in load_file(file).items()
    }


def reloaded(folder: Path, start: Path) -> None:
    """The export of a model that is read from the export at `start`, and does not learn."""
    changes: dict[str, Any] = {"model.model_path": str(start), "model.decoders": {}, "model.encoders": {}}
    changes |= {"train.lr": 0.0, "train.lr_min": 0.0}
    exported(folder, **changes, **{"model.tokenizer_path": str(start), "model.config_path": None})


def test_parts_are_saved_resumed_and_read_back(tmp_path: Path) -> None:
    run_ranks(1, exported, tmp_path / "whole")
    whole = weights_of(tmp_path / "whole" / "out" / "hf" / "final")
    start = tmp_path / "whole" / "out" / "checkpoints" / "global_step_2"
    run_ranks(1, resumed, tmp_path / "resumed", str(start))
    again = weights_of(tmp_path / "resumed" / "out" / "hf" / "final")
    assert whole.keys() == again.keys() and all(item.equal(again[name]) for name, item in whole.items())
    folder = tmp_path / "whole" / "out" / "hf" / "final"
    assert VQModel.from_pretrained(folder / "decoders" / "image").config.num_vq_embeddings == 16
    assert (folder / "decoders" / "image" / CODE_DECODER).is_file()
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "Qwen3ForCausalLM"
    run_ranks(1, reloaded, tmp_path / "read", folder)
    read = weights_of(tmp_path / "read" / "out" / "hf" / "final")
    assert whole.keys() == read.keys() and all(item.equal(read[name]) for name, item in whole.items())


@pytest.mark.parametrize("kind", ["janus", "emu3"])
def test_the_tokenizers_of_models_that_draw_are_used_as_they_are(tmp_path: Path, kind: str) -> None:
    """That of Janus out of the folder of a whole model."""
    path = write_drawer(tmp_path / "vq") if kind == "janus" else write_emu3_vq(tmp_path / "vq")
    spec: dict[str, Any] = {"model_path": path} | ({"image_size": 8} if kind == "emu3" else {})
    changes = {"model.decoders": {"image": spec}, "train.max_steps": 1, "train.save_hf_weights": True}
    assert run(config_of(tmp_path, **changes))[0]["targets/code"] > 0
    place = tmp_path / "out" / "hf" / "final"
    kept = decoder_folder(ModelConfig(model_path=str(place)))
    assert kept is not None and decoder_size(ModelConfig(model_path=str(place))) == spec.get("image_size")
    pixels = torch.rand(1, 3, *2 * [16 if kind == "janus" else 8]) * 2 - 1
    before, after = (
        PictureTokenizer(one, torch.device("cpu"), size=spec.get("image_size")) for one in (Path(path), kept)
    )
    assert before.encode(pixels).equal(after.encode(pixels))


def test_a_model_that_sees_by_codes_has_no_tower(tmp_path: Path, one: list[dict[str, Any]]) -> None:
    """The user's pictures are codes as well, but are not trained on."""
    made = run(config_of(tmp_path, **{"model.encoders": {}, "model.input_encoder": "decoder"}))
    assert made[0]["targets/code"] == one[0]["targets/code"]
    assert made[-1]["loss"] < made[0]["loss"] != one[0]["loss"]


def test_hidden_prompts_are_drawn_by_key_and_keep_media(tmp_path: Path, one: list[dict[str, Any]]) -> None:
    plain = run(config_of(tmp_path, **{"train.cfg_dropout": 0.0, "train.max_steps": 1}))
    assert plain[0]["loss"] != one[0]["loss"] and plain[0]["targets/code"] == one[0]["targets/code"]
    assert Hidden(0, frozenset({7}))([5, 7, 6]) == [0, 7, 0]


REFUSED = {
    "no tokenizer of pictures": ({"model.decoders": {}, "model.encode_target": True}, "there is no model.decoders"),
    "none that is trained": ({"model.decoders": {"image": {"config_path": "."}}}, "needs model_path"),
    "of a size of its own": ({"model.decoders": {"image": {"model_path": "VQ", "image_size": 8}}}, "leave it out"),
    "of a model that draws none": (
        {"model.decoders": {"image": {"model_path": "CHAMELEON"}}},
        "is of ChameleonVQVAE, which makes no pictures",
    ),
    "of sounds": ({"model.decoders": {"audio": {"model_path": "x"}}}, "there are decoders for image"),
    "stages": ({"train.pipeline_parallel_size": 2}, "train.pipeline_parallel_size: a model that draws"),
    "pairs": ({"data.data_type": "dpo", "train.cfg_dropout": 0.0}, "not trained with data.data_type dpo"),
    "streams": ({"data.datasets_type": "iterable", "model.encode_target": True}, "goes over the data beforehand"),
}


def test_pictures_to_see_need_an_encoder_of_them(tmp_path: Path) -> None:
    config = config_of(tmp_path, **{"model.encoders": {}})
    tokenizer, model = language.build(config, torch.device("cpu"))
    inputs = language.read_inputs(config, tokenizer, read_structure(model))
    with pytest.raises(ValueError, match=r"line 1: has image, .* takes it by model\.encoders\.image; it draws images"):
        open_data(config, inputs, model, ONE, 0, 1)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    if "VQ" in str(changes):
        changes = {"model.decoders": {"image": {"model_path": write_tokenizer(tmp_path), "image_size": 8}}}
    if "CHAMELEON" in str(changes):
        changes = {"model.decoders": {"image": {"model_path": write_drawer(tmp_path / "seeing", "chameleon")}}}
    world = changes.get("train.pipeline_parallel_size", 1)
    with pytest.raises(ValueError, match=message):
        language.build(config_of(tmp_path, world=world, **changes), torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "config.json",
            {"_class_name": "SD3Transformer2DModel"},
            "is of SD3Transformer2DModel",
        ),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is of FluxPipeline"),
        (
            "config.json",
            {"model_type": "chameleon_vqgan"},
            "is of ChameleonVQVAE, which makes codes of pictures but no",
        ),
        ("config.json", {"model_type": "glm_image_vqmodel"}, "is of GlmImageVQVAE, which makes codes of a vision"),
        ("config.json", {"model_type": "movqgan"}, "is of movqgan"),
        ("config.json", {"model_type": "janusvq16_decoder"}, "is of janusvq16_decoder"),
    ],
)
def test_other_decoders_are_refused_by_name(tmp_path: Path, name: str, content: dict, message: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{message}.*give the folder of a diffusers VQModel"):
        read_codes(tmp_path, "model.decoders.image.model_path")
