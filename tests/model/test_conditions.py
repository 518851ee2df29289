"""Captions are encoded as by the text encoders of each family's own pipeline."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.diffusion import make_data, make_folder
from tests.model.test_diffusion import net_of
from tests.train.runs import run
from tests.train.test_diffusion_run import config_of
from tutti.config.load import load
from tutti.core.keyed_random import generator
from tutti.infer.run import InferenceJob, infer
from tutti.model.conditions import Conditions
from tutti.model.diffusion import FAMILIES, to_tokens
from tutti.model.pipeline_folder import read_folder, read_scheduler

_VOCABULARY = 2048


def _t5(kind: str = "T5") -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": _VOCABULARY}
    return getattr(transformers, f"{kind}EncoderModel")(getattr(transformers, f"{kind}Config")(**sizes))


def _clip(width: int, kind: str = "CLIPTextModel") -> Any:
    sizes = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": _VOCABULARY}
    config = transformers.CLIPTextConfig(hidden_size=width, projection_dim=width, **sizes)
    return getattr(transformers, kind)(config)


_DECODER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": _VOCABULARY,
}


def _gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**_DECODER, head_dim=8))


def _qwen() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config={**_DECODER, "rope_parameters": rope}, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


ENCODERS: dict[str, dict[str, Callable[[], Any]]] = {
    "FluxTransformer2DModel": {"": lambda: _clip(16), "_2": _t5},
    "SD3Transformer2DModel": {
        "": lambda: _clip(8, "CLIPTextModelWithProjection"),
        "_2": lambda: _clip(8, "CLIPTextModelWithProjection"),
        "_3": _t5,
    },
    "QwenImageTransformer2DModel": {"": _qwen},
    "WanTransformer3DModel": {"": lambda: _t5("UMT5")},
    "LTXVideoTransformer3DModel": {"": _t5},
    "SanaTransformer2DModel": {"": _gemma},
    "PixArtTransformer2DModel": {"": _t5},
}


def make_pipeline(root: Path, name: str) -> Path:
    """The folder of a model with the kinds of text encoders that its family's pipeline has, in miniature."""
    make_folder(root, name)
    (root / "text_encoder/config.json").unlink()
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "tokenizer")
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    for number, make in ENCODERS[name].items():
        make().save_pretrained(root / f"text_encoder{number}")
        tokenizer.save_pretrained(root / f"tokenizer{number}")
    return root


def encoded_by_pipeline(pipeline: Any, name: str, caption: str) -> dict[str, torch.Tensor]:
    """The encoded caption that the pipeline passes to its transformer, captured from the call."""
    family, heard = FAMILIES[name], []

    class Stop(Exception):
        pass

    def listen(*args: Any, **inputs: Any) -> Any:
        heard.append(inputs)
        raise Stop

    pipeline.transformer.forward = listen
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(Stop):
        binning = "use_resolution_binning" in inspect.signature(pipeline.__call__).parameters
        sizes = {"height": 64, "width": 64, **({"use_resolution_binning": False} if binning else {})}
        pipeline(caption, **sizes, num_inference_steps=1, guidance_scale=1.0)
    found = {"embeds": heard[0]["encoder_hidden_states"], "mask": heard[0].get(family.mask or "")}
    found["pooled"] = heard[0].get("pooled_projections")
    return {part: value for part, value in found.items() if value is not None}


@pytest.mark.parametrize("name", ENCODERS)
def test_captions_are_encoded_as_the_pipeline_does(tmp_path: Path, name: str) -> None:
    """Long ones too, of which some pipelines encode less when they are called than their encode_prompt by itself."""
    folder = read_folder(make_pipeline(tmp_path / "model", name), "x")
    conditions = Conditions(folder, torch.device("cpu"), torch.float32, max_length=8, seed=0)
    kind = getattr(diffusers, folder.family.pipeline)
    needed = inspect.signature(kind.__init__).parameters
    parts = {part: None for part in needed if part != "self" and needed[part].default is inspect.Parameter.empty}
    vae = None if name.startswith("Sana") else conditions.vae  # of another class than its own, AutoencoderDC
    parts |= {"vae": vae, "transformer": net_of(name), "scheduler": read_scheduler(folder)}
    for part, path in folder.text_parts():
        encodes = part.startswith("text_encoder")
        loader = (
            getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
            if encodes
            else transformers.AutoTokenizer
        )
        parts[part] = loader.from_pretrained(path)
    pipeline = kind(**parts)
    for caption in ("a Fox in the snow", " ".join(map(str, range(400)))):
        want, got = encoded_by_pipeline(pipeline, name, caption), conditions.encode_text(caption)
        for part, value in want.items():
            ours = getattr(got, part)
            if part == "mask" and ours is None:
                assert value.all()
            else:
                torch.testing.assert_close(ours.to(value.dtype), value[0], rtol=1e-5, atol=1e-6)


def test_a_model_with_its_own_encoders_trains_and_draws_as_its_export_does_in_diffusers(tmp_path: Path) -> None:
    root = make_pipeline(tmp_path / "model", "FluxTransformer2DModel")
    changes = {"model.config_path": str(root), "train.num_train_epochs": 1, "train.save_hf_weights": True}
    make_data(tmp_path / "pictures")
    (tmp_path / "diffusion").mkdir()  # what config_of would make
    run(config_of(tmp_path, "FluxTransformer2DModel", **changes))
    exported = tmp_path / "out/hf/final"
    settings = [f"infer.model_path={exported}", "infer.image_steps=2", "infer.image_guidance=2.5"]
    infer(
        load([*settings, "infer.image_size=16x16"], "infer"), InferenceJob(("a fox",), output=str(tmp_path / "drawn"))
    )
    pipeline = diffusers.DiffusionPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(4, 8, 8, generator=generator(load(settings, "infer").infer.seed, "sample", "a fox"))
    latents = to_tokens(noise.unsqueeze(0), FAMILIES["FluxTransformer2DModel"])
    (theirs,) = pipeline(
        "a fox", height=16, width=16, num_inference_steps=2, guidance_scale=2.5, latents=latents, return_dict=False
    )
    ours = np.asarray(Image.open(tmp_path / "drawn/1.png")).astype(int)
    assert np.abs(ours - np.asarray(theirs[0])).max() <= 1
