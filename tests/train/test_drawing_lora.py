"""Models that draw, trained by low-rank adapters: what is new in them is trained whole, and saved with these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from tests.harness import regroup, run_ranks
from tests.infer.models import write_model
from tests.model.drawers import drawer_config, write_drawer
from tests.train import test_draw_run, test_flow_run
from tests.train.runs import train_quietly
from tests.train.test_features_run import lines_of
from tests.train.test_run import assert_same_training
from tutti.checkpoint.adapter import WEIGHTS
from tutti.config import Config, InferConfig
from tutti.config.rules import warnings
from tutti.infer.run import InferenceJob, infer
from tutti.kinds import language
from tutti.kinds.export import export
from tutti.model.structure import ADAPTER_MARK

LORA = {"train.architecture": "lora", "train.lora_rank": 4, "train.lora_alpha": 8.0}
MAKERS = {"codes": test_draw_run.config_of, "diffusion": test_flow_run.config_of}


def config_of(folder: Path, kind: str = "codes", *, world: int = 1, **changes: Any) -> Config:
    """A Qwen3 from a folder, with adapters, which draws by codes or by diffusion and sees by a random tower."""
    base = folder / "base"
    if not base.exists():
        write_model(base, vocab_size=2064)
    of_base = {"model.config_path": None, "model.model_path": str(base), "model.tokenizer_path": str(base)}
    return MAKERS[kind](folder, world=world, **of_base, **LORA, **changes)


def trained(folder: Path, kind: str) -> None:
    """A run, the same resumed after its first step, and the merged model of it."""
    torch.set_num_threads(1)
    both = {"train.save_steps": 1, "train.save_hf_weights": True}
    train_quietly(config_of(folder, kind, **both))
    regroup()
    start, again = str(folder / "out/checkpoints/global_step_1"), str(folder / "resumed/out")
    train_quietly(config_of(folder, kind, **both, **{"train.load_checkpoint_path": start, "train.output_dir": again}))
    regroup()
    export(str(folder / "out/checkpoints/global_step_2"), str(folder / "merged"), merge_adapters=True)


def drawn(folder: Path, model: str) -> None:
    torch.set_num_threads(1)
    settings = InferConfig(model_path=str(folder / model), max_tokens=8, image_guidance=2.0, image_steps=2, seed=3)
    (folder / "ask.jsonl").write_text('{"prompt": "Draw: dog"}\n')
    job = InferenceJob(
        input=str(folder / "ask.jsonl"), output=str(folder / f"{model.replace('/', '_')}.jsonl"), draw=True
    )
    infer(Config(infer=settings), job)


@pytest.fixture(scope="module", params=MAKERS)
def made(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A way to draw, and the folder of its runs."""
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(1, trained, folder, request.param)
    return request.param, folder


def test_adapters_and_what_is_new_are_trained_and_nothing_else(made: tuple[str, Path]) -> None:
    kind, folder = made
    first = lines_of(folder)[0]
    assert first[f"targets/{'code' if kind == 'codes' else 'flow'}"] > 0
    saved = load_file(folder / "out/hf/final" / WEIGHTS[0])
    names = {name.removeprefix("base_model.model.") for name in saved}
    adapted = {name for name in names if ".lora_" in name}
    assert adapted and all(name.startswith("foundation.model.layers.") for name in adapted)
    parts = {".".join(name.split(".")[:2]) for name in names - adapted}
    assert parts == {"encoders.image", "decoders.image"}, "the tower has no weights, and is new too"


def test_a_run_that_goes_on_is_the_same(made: tuple[str, Path]) -> None:
    _, folder = made
    whole, resumed = (load_file(folder / out / "hf/final" / WEIGHTS[0]) for out in ("out", "resumed/out"))
    assert whole.keys() == resumed.keys() and all(torch.equal(item, resumed[name]) for name, item in whole.items())


def test_adapters_a_checkpoint_and_the_merged_model_draw_the_same(made: tuple[str, Path]) -> None:
    _, folder = made
    places = ("out/hf/final", "out/checkpoints/global_step_2", "merged")
    for model in places:
        run_ranks(1, drawn, folder, model)
    pictures = [next(folder.glob(f"{model.replace('/', '_')}*/*.png")) for model in places]
    first, *others = (np.asarray(Image.open(path)).astype(int) for path in pictures)
    assert first.std() > 1 and all(np.abs(first - other).max() <= 1 for other in others)


def test_two_ranks_equal_one(made: tuple[str, Path]) -> None:
    kind, folder = made
    sharded = {"train.data_parallel_mode": "fsdp2", "train.output_dir": str(folder / "two/out")}
    run_ranks(2, train_quietly, config_of(folder, kind, world=2, **sharded))
    assert_same_training(lines_of(folder / "two"), lines_of(folder))


def test_a_janus_is_adapted_and_its_own_parts_for_drawing_are_trained(tmp_path: Path) -> None:
    """peft reads both."""
    from peft import PeftModel

    base = write_drawer(tmp_path / "janus")
    changes = {"train.save_hf_weights": True, "train.lr": 1e-2}
    run_ranks(1, train_quietly, drawer_config(tmp_path, base, **LORA, **changes))
    assert lines_of(tmp_path)[0]["targets/code"] > 0
    plain: Any = AutoModelForMultimodalLM.from_pretrained(base)
    adapted: Any = PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(base), tmp_path / "out/hf/final")
    saved = load_file(tmp_path / "out/hf/final" / WEIGHTS[0])
    trained_head = saved["base_model.model.model.generation_head.vision_head.weight"]
    head = adapted.base_model.model.model.generation_head.vision_head
    head = getattr(head, "modules_to_save", {"default": head})["default"]
    assert torch.equal(head.weight, trained_head)
    assert not torch.equal(trained_head, plain.model.generation_head.vision_head.weight)
    assert not any("vqmodel" in name or "vision_model" in name for name in saved)


@pytest.mark.parametrize("family", ["emu3", "chameleon"])
def test_adapters_of_models_whose_codes_are_tokens_are_those_that_peft_applies(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    base = write_drawer(tmp_path / family, family)
    changes = {"train.save_hf_weights": True, "train.save_steps": 1, "train.lr": 3e-2, "data.image_max_pixels": 64}
    run_ranks(1, _train_and_merge, drawer_config(tmp_path, base, **LORA, **changes), str(tmp_path / "merged"))
    assert lines_of(tmp_path)[0]["targets/code"] > 0
    saved = load_file(tmp_path / "out/hf/final" / WEIGHTS[0])
    assert saved and all(".layers." in name and ".lora_" in name and "vqmodel" not in name for name in saved)
    plain: Any = AutoModelForMultimodalLM.from_pretrained(base)
    adapted = peft.PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(base), tmp_path / "out/hf/final")
    merged: Any = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(1, 30)[None]
    with torch.no_grad():
        before, theirs, ours = (model.eval()(input_ids=ids).logits for model in (plain, adapted, merged))
    assert (theirs - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _train_and_merge(config: Config, merged: str) -> None:
    torch.set_num_threads(1)
    train_quietly(config)
    regroup()
    export(config.train.output_dir or "", merged, merge_adapters=True)


def test_frozen_parts_are_not_trained_beside_adapters(tmp_path: Path) -> None:
    _, model = language.build(config_of(tmp_path, **{"train.freeze": ["decoders"]}), torch.device("cpu"))
    trained_parts = {name.split(".")[0] for name, item in model.named_parameters() if item.requires_grad}
    assert trained_parts == {"encoders", "foundation"}
    assert all(ADAPTER_MARK in name for name, item in model.foundation.named_parameters() if item.requires_grad)


def test_some_of_what_is_new_may_be_frozen(tmp_path: Path) -> None:
    frozen = "decoders.image.net.*"
    _, model = language.build(config_of(tmp_path, "diffusion", **{"train.freeze": [frozen]}), torch.device("cpu"))
    names = {name for name, item in model.named_parameters() if item.requires_grad and name.startswith("decoders.")}
    assert names and not any(name.startswith("decoders.image.net.") for name in names)
    adapted = {"train.freeze": [frozen], "train.lora_targets": ["q_proj", "to_q"]}
    _, model = language.build(config_of(tmp_path, "diffusion", **adapted), torch.device("cpu"))
    found = {name for name, item in model.named_parameters() if item.requires_grad and ".net." in name}
    assert found and all("to_q" in name and ADAPTER_MARK in name for name in found)


def test_freezing_is_warned_of_where_adapters_leave_nothing_to_freeze(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    janus, cpu = write_drawer(tmp_path / "janus"), torch.device("cpu")
    configs = {"composed": lambda **changes: config_of(tmp_path, **changes)}
    configs["ready"] = lambda **changes: drawer_config(tmp_path, janus, **LORA, **changes)
    parts = {"composed": {"decoders", "towers", "projectors"}, "ready": {"decoders"}}  # the tower has no weights
    for name, make in configs.items():
        for part in ("decoders", "towers", "projectors", "language_model"):
            caplog.clear()
            config = make(**{"train.freeze": [part]})
            language.build(config, cpu)
            warned = f"train.freeze: {part} has no effect" in caplog.text
            assert warned == (part not in parts[name]), (name, part)
            assert not any("train.freeze" in line for line in warnings(config))
    with pytest.raises(ValueError, match=r"train\.lora_full_modules: vqmodel is frozen"):
        language.build(configs["ready"](**{"train.lora_full_modules": ["vqmodel"]}), cpu)
