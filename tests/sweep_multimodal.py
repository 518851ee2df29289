"""The sweep over families that take media, from files on disk: equal to the original class, or refused by name.
`make sweep-media` runs all families and writes the table in docs/multimodal.md.

A family is one of `tests.data.processors`: a tiny model of its class, with a processor of its class over the quickstart
tokenizer, asked about every kind of media that it takes. Columns: *alone*, loss (1e-5) and gradients (1e-4) of each
sample by itself; *packed*, of all in one row; *fsdp2* and *ulysses*, two steps on two ranks as one process makes them;
*adapters*, by LoRA; *saved*, an export that transformers loads as what was exported, with its processor; *generated*,
greedy answers as transformers gives them.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForMultimodalLM, AutoProcessor

from tests import sweep_layouts
from tests.data.processors import PROCESSORS
from tests.harness import run_ranks
from tests.infer.models import ONE
from tests.infer.test_media import answers, requests_of, write_model
from tests.model.test_media import CONFIGS, OTHERS, build
from tests.model.test_recordings import FAMILIES, encoded, encoder_of, own_inputs, own_loss, row, write_files
from tests.sweep import EQUAL, FAILED, REFUSED, Kind, compare, saved
from tests.train.runs import records
from tests.train.runs import tiny_config as run_config
from tests.train.test_recordings_run import train_all
from tutti.config.load import from_dict
from tutti.core.batch import pack
from tutti.infer.load import load_model
from tutti.infer.media import MediaInputs
from tutti.model.multimodal import make_media_positions
from tutti.model.structure import read_structure
from tutti.train.objective import Objective

PAGE = Path(__file__).parents[1] / "docs" / "multimodal.md"
MARK = "media"
COLUMNS = ("alone", "packed", "fsdp2", "ulysses", "adapters", "saved", "generated")
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"train.data_parallel_mode": "fsdp2"}, "ulysses": {"train.ulysses_parallel_size": 2},
}  # fmt: skip
QUESTIONS: dict[str, dict[str, Any]] = {
    "image": {"prompt": "<image>, then <image>: what do you see?", "images": ["still.png", "frame3.png"]},
    "video": {"prompt": "<video>What moves?", "videos": ["short.webm"]},
    "audio": {"prompt": "<audio>, then <audio>: what is louder?", "audios": ["long.wav", "high.flac"]},
}
NEW = 12

Measured = tuple[float, dict[str, Tensor]]


def families() -> list[str]:
    """The families that there is a tiny processor and a tiny model of."""
    return sorted(PROCESSORS.keys() & (CONFIGS | OTHERS).keys())


def rows_of(family: str, processor: Any) -> list[dict[str, Any]]:
    """Chats about media of the kinds that a family takes, and one of text alone."""
    text = {"messages": row()["messages"]}
    rows = FAMILIES[family][1] if family in FAMILIES else [text]
    if getattr(processor, "image_token", None):
        rows = [*rows, row(("image", "still.png")), row(("image", "frame3.png"), ("image", "still.png"))]
    return rows


def compared(family: str, folder: Path) -> dict[str, str]:
    """The loss and the gradients of samples alone and packed beside those of the original class."""
    processor = PROCESSORS[family]()
    plain, packed = build(family, processor)
    rows, encoder = rows_of(family, processor), encoder_of(processor, **limits_of(family))
    samples = encoded(encoder, folder, *rows)
    total = torch.zeros(())
    for chat, sample in zip(rows, samples, strict=True):
        inputs = own_inputs(processor, folder, chat, sample)
        if inputs["input_ids"][0].tolist() != sample.input_ids.tolist():
            return dict.fromkeys(COLUMNS[:2], f"{FAILED}: token ids of a row")
        total = total + own_loss(plain, inputs, sample)
    want = _measured(plain, total)

    def loss_of(batch: list[Any]) -> Tensor:
        made = pack(batch, pad_to=sum(map(len, batch)) + 3)
        made = replace(made, extras=encoder.extras(batch, len(made.input_ids)))
        return Objective(packed)(make_media_positions(read_structure(packed))(made))["loss"]

    alone = _measured(packed, sum((loss_of([sample]) for sample in samples), torch.zeros(())))
    together = _measured(packed, loss_of(samples))
    return {"alone": compare(alone, want), "packed": compare(together, want)}


def limits_of(family: str) -> dict[str, Any]:
    """The limits on data that a family needs."""
    return FAMILIES[family][0] if family in FAMILIES else {}


def _measured(model: Any, loss: Tensor) -> Measured:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def trained(family: str, root: Path, folder: Path) -> dict[str, str]:
    """Two steps on two ranks beside those of one process, with adapters, and what one process exports."""
    model, rows = write_model(root / "model", family), folder / "rows.jsonl"
    some = rows_of(family, PROCESSORS[family]())
    rows.write_text("\n".join(json.dumps(one) for one in some * (40 // len(some))))
    common = {
        "model.model_path": model, "model.tokenizer_path": model, "data.train_path": str(rows), "train.max_steps": 2,
        "data.max_seq_len": 1024, "train.lr": 1e-3, "train.adam_eps": 1e-4, "train.micro_batch_size": 1,
        "train.global_batch_size": 2, "data.drop_last": False,
        **{f"data.{name}": value for name, value in limits_of(family).items()},
    }  # fmt: skip

    def config(name: str, world: int, **changes: Any) -> Any:
        (root / name).mkdir()
        return run_config(root / name, world=world, **common | changes)

    one = config("trained", 1, **{"train.save_hf_weights": True})
    adapters = config("adapters", 1, **{"train.architecture": "lora", "train.lora_rank": 4})
    said = dict(zip(("trained", "adapters"), _outcomes([one, adapters], 1), strict=True))
    if said["trained"] != EQUAL:
        return {"fsdp2": said["trained"]}
    found = {"adapters": said["adapters"]}
    layouts = {name: config(name, 2, **changes) for name, changes in LAYOUTS.items()}
    for (name, two), outcome in zip(layouts.items(), _outcomes(list(layouts.values()), 2), strict=True):
        found[name] = sweep_layouts.compare(records(two), records(one)) if outcome == EQUAL else outcome
    AutoProcessor.from_pretrained(Path(one.train.output_dir) / "hf" / "final")
    made = AutoModelForMultimodalLM.from_pretrained(model)
    return found | {"saved": saved(made.config, made, Kind(AutoModelForMultimodalLM, {}))}


def _outcomes(configs: list[Any], world: int) -> list[str]:
    """For each configuration whether it is trained by, all in the same processes; if that fails each in its own."""
    try:
        run_ranks(world, _train_on_small_videos, configs, timeout=150)
    except (AssertionError, TimeoutError):
        return [sweep_layouts.outcome(config, world)[0] for config in configs]
    return [EQUAL] * len(configs)


def _train_on_small_videos(configs: list[Any]) -> None:
    """Train by all configurations, while classes of processors whose saved form cannot say how small videos may become
    have the bounds of the tiny ones."""
    for family in ("qwen2_5_omni", "qwen3_omni"):
        processor = PROCESSORS[family]()
        type(processor).videos_kwargs = processor.videos_kwargs
    train_all(configs)


def generated(family: str, root: Path, folder: Path) -> str:
    """Greedy answers to prompts with media and without, in one batch, beside transformers' own to each alone."""
    path, processor = str(root / "model"), PROCESSORS[family]()
    kinds = [kind for kind in QUESTIONS if getattr(processor, f"{kind}_token", None)]
    if family not in FAMILIES:
        kinds = ["image"]
    config = from_dict({"infer": {"model_path": path, "do_sample": False}, "data": limits_of(family)})
    loaded = load_model(config, ONE)
    requests = requests_of(loaded, [{"prompt": "Nothing?"}, *(QUESTIONS[kind] for kind in kinds)], folder, NEW)
    inputs = MediaInputs(loaded.form.media)
    model: Any = AutoModelForMultimodalLM.from_pretrained(path, attn_implementation="eager").eval()
    for request, made in zip(requests, answers(loaded, config, requests), strict=True):
        values = inputs.stacked([(request.ids, request.media)])
        if "mm_token_type_ids" not in inspect.signature(model.forward).parameters:
            values.pop("mm_token_type_ids", None)
        ids = torch.tensor([list(request.ids)])
        options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **values, **options)
        if out[0, ids.shape[1] :].tolist() != made:
            return f"{FAILED}: {made}, not {out[0, ids.shape[1] :].tolist()}"
    return EQUAL


def check(family: str) -> dict[str, str]:
    """The cells of a family, by column."""
    with tempfile.TemporaryDirectory() as place:
        root, folder = Path(place), Path(place, "files")
        folder.mkdir()
        write_files(folder)
        found: dict[str, str] = {}
        parts: dict[str, Callable[[], dict[str, str]]] = {
            "alone": partial(compared, family, folder),
            "saved": partial(trained, family, root, folder),
            "generated": lambda: {"generated": generated(family, root, folder)},
        }
        for column, part in parts.items():
            try:
                found |= part()
            except ValueError as error:
                found[column] = f"{REFUSED}: {error}"
            except Exception as error:
                found[column] = f"{FAILED}: {type(error).__name__}: {error}"
        return found


if __name__ == "__main__":
    sweep_layouts.sweep_families(__doc__, check, families(), COLUMNS, MARK, PAGE)
