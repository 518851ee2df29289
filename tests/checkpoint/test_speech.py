"""Models with speech output: their thinker is loaded and exported within the full model; the rest stays unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedConfig

from tests.checkpoint.weighing import ONE
from tests.data.processors import PROCESSORS
from tests.model.test_media import build
from tests.train.runs import tiny_config
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.hf_save import export_hf
from tutti.model.build import build_model

WHOLE = {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni": "qwen3_omni_moe"}


def write_whole(family: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """Write a checkpoint of a full model with some tensors of its speech part; returns its thinker and the tensors."""
    thinker, _ = build(family, PROCESSORS[family]())
    thinker.save_pretrained(folder)
    tensors = {f"thinker.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    tensors |= {"talker.model.norm.weight": torch.randn(7).half(), "token2wav.bias": torch.randn(3, 2)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    whole: PreTrainedConfig = AutoConfig.for_model(WHOLE[family], thinker_config=thinker.config.to_dict())
    whole.architectures = ["TheWholeModel"]
    whole.save_pretrained(folder)
    return thinker, tensors


@pytest.mark.parametrize("family", WHOLE)
def test_a_thinker_is_trained_within_its_whole_model(tmp_path: Path, family: str) -> None:
    thinker, tensors = write_whole(family, tmp_path / "whole")
    config = tiny_config(tmp_path, **{"model.model_path": str(tmp_path / "whole")})
    model = build_model(config, device=torch.device("cpu"))
    load_weights(model, tmp_path / "whole", world=ONE)
    assert type(model).__name__ == type(thinker).__name__
    for name, tensor in thinker.state_dict().items():
        assert model.state_dict()[name].equal(tensor), name
    with torch.no_grad():
        model.lm_head.weight.add_(1)  # type: ignore[union-attr, operator]
    export_hf(model, tmp_path / "out", PROCESSORS[family]().tokenizer, world=ONE)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    changed = {key for key, tensor in tensors.items() if not written[key].equal(tensor)}
    assert changed == {"thinker.lm_head.weight"}
    assert {key: written[key].dtype for key in written} == {key: tensor.dtype for key, tensor in tensors.items()}
    again = AutoConfig.from_pretrained(tmp_path / "out")
    assert (again.model_type, again.architectures) == (WHOLE[family], ["TheWholeModel"])
    reloaded = build_model(tiny_config(tmp_path, **{"model.model_path": str(tmp_path / "out")}))
    load_weights(reloaded, tmp_path / "out", world=ONE)
    assert reloaded.state_dict()["lm_head.weight"].equal(model.state_dict()["lm_head.weight"])


def test_a_thinker_alone_is_a_model_as_any(tmp_path: Path) -> None:
    thinker, _ = build("qwen2_5_omni", PROCESSORS["qwen2_5_omni"]())
    thinker.save_pretrained(tmp_path / "thinker")
    model = build_model(tiny_config(tmp_path, **{"model.model_path": str(tmp_path / "thinker")}))
    load_weights(model, tmp_path / "thinker", world=ONE)
    export_hf(model, tmp_path / "out", PROCESSORS["qwen2_5_omni"]().tokenizer, world=ONE)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out")
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in thinker.state_dict().items())
