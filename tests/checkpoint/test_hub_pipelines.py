"""Diffusion models by hub name: which pipeline files are downloaded, and that training and inference accept the
name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hub import HubServer
from tests.infer.models import ONE
from tests.train.test_diffusion_run import config_of
from tutti.checkpoint.hub import pin_model, with_local_paths
from tutti.config import Config, ModelConfig
from tutti.config.load import load
from tutti.core.hub import Repo
from tutti.infer.run import InferenceJob, infer
from tutti.train.run import train

SMALL = (
    "model_index.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer_2/spiece.model",
)
WEIGHTS = (
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "transformer/diffusion_pytorch_model-1.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors",
)
ALL = ("vae", "text_encoder")
NEEDLESS = (
    "sd.safetensors",
    "README.md",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "safety_checker/config.json",
    "vae/flax_model.msgpack",
)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"weights": True, "conditions": ALL}, [*SMALL, *WEIGHTS]),
        ({"weights": False, "conditions": ALL}, [*SMALL, *(name for name in WEIGHTS if "transformer" not in name)]),
        ({"weights": True, "conditions": ("vae",)}, [*SMALL, *(name for name in WEIGHTS if "text" not in name)]),
        ({"weights": False}, SMALL),
    ],
    ids=["to go on with", "to begin anew", "to be led", "to describe"],
)
def test_the_files_of_parts_that_are_read_are_downloaded(
    hub: HubServer, options: dict[str, Any], wanted: list[str]
) -> None:
    files = {name: name.encode() for name in (*SMALL, *WEIGHTS, *NEEDLESS)}
    files[WEIGHTS[0]] = b'{"weight_map": {"a": "diffusion_pytorch_model-1.safetensors"}}'
    hub.add("models/org/pipeline", files)
    pin_model(Repo("model", "org/pipeline", "main", "model.model_path"), **options)
    assert hub.downloads() == sorted(wanted)


def test_a_part_without_weights_is_refused_by_name(hub: HubServer) -> None:
    hub.add("models/org/pipeline", {"transformer/config.json": b"{}", "vae/config.json": b"{ }"})
    with pytest.raises(ValueError, match="org/pipeline has no weights in transformer/ in Hugging Face's format"):
        pin_model(Repo("model", "org/pipeline", "main", "model.model_path"), weights=True)


def test_a_tokenizer_of_pictures_and_adapters_take_names(hub: HubServer) -> None:
    hub.add("models/org/vq", {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"1"})
    hub.add("models/org/lora", {"pytorch_lora_weights.safetensors": b"2"})
    decoders = {"image": {"model_path": "org/vq", "image_size": 8}}
    found = with_local_paths(Config(model=ModelConfig(decoders=decoders, adapter_path="org/lora")), ONE).model
    assert Path(found.decoders["image"]["model_path"], "diffusion_pytorch_model.safetensors").is_file()
    assert found.decoders["image"]["image_size"] == 8
    assert Path(found.adapter_path or "", "pytorch_lora_weights.safetensors").is_file()


def test_training_and_drawing_take_a_name(hub: HubServer, tmp_path: Path) -> None:
    """Also for a run's checkpoint, whose other parts are in the hub's cache."""
    short = {"train.num_train_epochs": 1, "train.save_hf_weights": True}
    train(config_of(tmp_path, **short))
    exported = tmp_path / "out/hf/final"
    hub.add("models/org/drawer", exported)
    named = {"model.config_path": None, "model.model_path": "org/drawer", "train.output_dir": str(tmp_path / "named")}
    train(config_of(tmp_path, **named, **{"train.num_train_epochs": 1, "train.save_steps": 1}))
    assert "model_path: org/drawer" in (tmp_path / "named/config.yaml").read_text()
    for model, place in (("org/drawer", "by_name"), (str(exported), "by_path"), (str(tmp_path / "named"), "of_run")):
        settings = [f"infer.model_path={model}", "infer.image_steps=2", "data.max_seq_len=8"]
        infer(load(settings, "infer"), InferenceJob(("a cat",), output=str(tmp_path / place)))
    drawn = [(tmp_path / place / "1.png").read_bytes() for place in ("by_name", "by_path", "of_run")]
    assert drawn[0] == drawn[1] != drawn[2]
