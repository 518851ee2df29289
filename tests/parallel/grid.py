"""The table of layouts that are compared with one process: the trainings (`KINDS`) and the layouts (`LAYOUTS`).

Every run takes five steps of eight micro batches each, of packed samples of uneven lengths, accumulated wherever there
are fewer data-parallel ranks than that. `tests.parallel.test_grid` sees to it that the table is complete.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.model.zoo import tiny
from tests.train.runs import QUICKSTART, tiny_config
from tutti.config import Config

NUM_STEPS = 5
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
DEEP = {"num_hidden_layers": 4}


class Kind(NamedTuple):
    """A training: a family of `tests.model.zoo` with changes to its config, and arguments by their full names or
    those of the train group."""

    family: str
    model: dict[str, Any]
    arguments: dict[str, Any]


KINDS = {
    "tied": Kind("qwen3", {}, {}),
    "untied": Kind("llama", {"vocab_size": 2051}, {}),
    "deep": Kind("llama", DEEP, {}),
    "windows": Kind("gemma2", {}, {}),
    "positions": Kind("gpt2", {}, {}),
    "sinks": Kind("gpt_oss", {}, {}),
    "latent": Kind("deepseek_v3", {}, {}),
    "experts": Kind("qwen3_moe", ROUTER, {}),
    "deep experts": Kind("qwen3_moe", DEEP | ROUTER, {}),
    "mixtral": Kind("mixtral", ROUTER, {}),
    "classes": Kind(
        "qwen3",
        {},
        {
            "data.data_type": "classification",
            "data.train_path": "topics",
            "model.num_labels": 4,
            "dyn_bsz": False,
        },
    ),
    "pairs": Kind("qwen3", {}, {"data.data_type": "dpo", "data.train_path": "preferences", "dyn_bsz": False}),
    "adapters": Kind("qwen3", {}, {"architecture": "lora", "lora_rank": 4}),
    "sources": Kind("qwen3", {}, {"data.train_path": "sources"}),
    "muon": Kind("llama", {}, {"optimizer": "muon"}),
    "muon experts": Kind("qwen3_moe", ROUTER, {"optimizer": "muon"}),
    "bf16": Kind("qwen3", {}, {"compute_dtype": "bfloat16"}),
    "bf16 experts": Kind("qwen3_moe", ROUTER, {"compute_dtype": "bfloat16", "lr": 1e-3}),
}


class Layout(NamedTuple):
    """A kind of run on some ranks; train: arguments of the train group."""

    kind: str
    world: int
    train: dict[str, Any]


def sizes(**axes: int) -> dict[str, int]:
    """The arguments of these axes, by their short names."""
    data = {"replicate": "data_parallel_replicate_size", "shard": "data_parallel_shard_size"}
    return {data.get(axis, f"{axis}_parallel_size"): size for axis, size in axes.items()}


ZERO3, FSDP1 = {"data_parallel_mode": "fsdp2"}, {"data_parallel_mode": "fsdp1"}
ZERO2 = ZERO3 | {"enable_full_shard": False}
HYBRID = ZERO3 | sizes(replicate=2, shard=2)
REMAT = {"enable_gradient_checkpointing": True}
PLAIN_REMAT = REMAT | {"enable_reentrant": False}
ASYNC, STRIDED = {"async_enabled": True}, {"ep_outside": True}
OFFLOAD, STATES_OFFLOAD = {"enable_activation_offload": True}, {"enable_fsdp_offload": True}
INTERLEAVED = {"pipeline_schedule": "interleaved", "pipeline_stages_per_rank": 2}
ZERO_BUBBLE = {"pipeline_schedule": "zero_bubble"}

LAYOUTS = {
    "one rank, everything kept small": Layout("windows", 1, ZERO3 | REMAT | OFFLOAD),
    "ddp": Layout("tied", 2, sizes(replicate=2)),
    "fsdp1": Layout("tied", 2, FSDP1),
    "zero3": Layout("untied", 2, ZERO3),
    "zero2, states offloaded": Layout("tied", 2, ZERO2 | STATES_OFFLOAD),
    "tensor": Layout("tied", 2, sizes(tensor=2)),
    "tensor, remat, activations offloaded": Layout("windows", 2, sizes(tensor=2) | REMAT | OFFLOAD),
    "pipeline": Layout("tied", 2, sizes(pipeline=2)),
    "pipeline, positions, plain remat": Layout("positions", 2, sizes(pipeline=2) | PLAIN_REMAT),
    "pipeline, activations offloaded": Layout("deep", 2, sizes(pipeline=2) | OFFLOAD),
    "interleaved, router loss": Layout("deep experts", 2, sizes(pipeline=2) | INTERLEAVED),
    "zero bubble": Layout("deep", 2, sizes(pipeline=2) | ZERO_BUBBLE),
    "ulysses": Layout("sinks", 2, sizes(ulysses=2)),
    "ulysses, async, remat": Layout("windows", 2, sizes(ulysses=2) | ASYNC | REMAT),
    "context": Layout("windows", 2, sizes(context=2)),
    "expert": Layout("experts", 2, ZERO3 | sizes(expert=2) | PLAIN_REMAT),
    "expert x ulysses": Layout("latent", 2, sizes(expert=2, ulysses=2) | {"model.moe_implementation": "eager"}),
    "expert x context": Layout("sinks", 2, sizes(expert=2, context=2)),
    "expert x tensor": Layout("mixtral", 2, sizes(expert=2, tensor=2)),
    "classes, ulysses": Layout("classes", 2, sizes(ulysses=2)),
    "classes, context": Layout("classes", 2, sizes(context=2)),
    "classes, tensor": Layout("classes", 2, sizes(tensor=2)),
    "classes, pipeline": Layout("classes", 2, sizes(pipeline=2)),
    "adapters, tensor": Layout("adapters", 2, sizes(tensor=2)),
    "adapters, pipeline": Layout("adapters", 2, sizes(pipeline=2)),
    "bf16, tensor, remat": Layout("bf16", 2, sizes(tensor=2) | REMAT),
    "hybrid": Layout("untied", 4, HYBRID | REMAT),
    "ddp x tensor": Layout("windows", 4, sizes(tensor=2)),
    "ddp x pipeline": Layout("tied", 4, sizes(pipeline=2)),
    "ddp x ulysses": Layout("tied", 4, sizes(ulysses=2)),
    "ddp x context": Layout("tied", 4, sizes(context=2)),
    "zero3 x tensor": Layout("untied", 4, ZERO3 | sizes(tensor=2)),
    "zero3 x pipeline": Layout("tied", 4, ZERO3 | sizes(pipeline=2) | ZERO_BUBBLE | REMAT),
    "zero3 x ulysses": Layout("experts", 4, ZERO3 | sizes(ulysses=2)),
    "zero3 x context": Layout("sources", 4, ZERO3 | sizes(context=2) | PLAIN_REMAT),
    "pipeline x tensor": Layout("untied", 4, sizes(pipeline=2, tensor=2)),
    "pipeline x ulysses": Layout("deep", 4, sizes(pipeline=2, ulysses=2) | INTERLEAVED),
    "pipeline x context, router loss": Layout("experts", 4, sizes(pipeline=2, context=2)),
    "tensor x ulysses, async": Layout("tied", 4, sizes(tensor=2, ulysses=2) | ASYNC),
    "tensor x context": Layout("windows", 4, sizes(tensor=2, context=2)),
    "context x ulysses": Layout("latent", 4, sizes(context=2, ulysses=2)),
    "tensor, more ranks than key/value heads": Layout("untied", 4, sizes(tensor=4)),
    "ulysses, more ranks than key/value heads": Layout("sources", 4, sizes(ulysses=4)),
    "context, four ranks, remat": Layout("sinks", 4, sizes(context=4) | PLAIN_REMAT),
    "pipeline, four ranks": Layout("deep", 4, sizes(pipeline=4)),
    "expert x pipeline": Layout("experts", 4, ZERO3 | sizes(expert=2, pipeline=2)),
    "expert x tensor x ulysses": Layout("mixtral", 4, ZERO3 | sizes(expert=4, tensor=2, ulysses=2)),
    "expert, more tensor ranks": Layout("experts", 4, sizes(expert=2, tensor=4)),
    "expert within zero3 and tensor": Layout("latent", 4, ZERO3 | sizes(expert=4, tensor=2) | REMAT),
    "expert, strided, zero2": Layout("sinks", 4, ZERO2 | sizes(expert=2) | STRIDED),
    "hybrid x expert, built on the cpu": Layout("experts", 4, HYBRID | sizes(expert=2) | {"init_device": "cpu"}),
    "muon, zero3 x tensor": Layout("muon", 4, ZERO3 | sizes(tensor=2)),
    "muon, expert within zero3 and tensor": Layout("muon experts", 4, ZERO3 | sizes(expert=2, tensor=2)),
    "muon, zero3 x pipeline": Layout("muon", 4, ZERO3 | sizes(pipeline=2)),
    "pairs, zero3 x tensor": Layout("pairs", 4, ZERO3 | sizes(tensor=2)),
    "bf16, context x ulysses": Layout("bf16", 4, sizes(context=2, ulysses=2)),
    "bf16, expert x pipeline": Layout("bf16 experts", 4, ZERO3 | sizes(expert=2, pipeline=2)),
    "tensor x pipeline x zero3": Layout("tied", 8, ZERO3 | sizes(tensor=2, pipeline=2)),
    "zero3 x ulysses x context": Layout("experts", 8, ZERO3 | sizes(ulysses=2, context=2) | ASYNC | REMAT),
    "zero3 x expert x ulysses": Layout("latent", 8, ZERO3 | sizes(expert=4, ulysses=2)),
    "hybrid x expert x tensor": Layout("sinks", 8, HYBRID | sizes(expert=4, tensor=2) | STRIDED),
    "everything": Layout("deep experts", 8, ZERO3 | sizes(expert=4, tensor=2, pipeline=2) | ZERO_BUBBLE),
}


def write_data(folder: Path) -> None:
    """Data of the trainings: the first rows of data/quickstart, and two sources."""
    for name in ("chat", "topics", "preferences"):
        rows = (QUICKSTART / f"{name}.jsonl").read_text().splitlines(keepends=True)[:140]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    rows = (folder / "chat.jsonl").read_text().splitlines(keepends=True)
    (folder / "short.jsonl").write_text("".join(sorted(rows, key=len)[:70]))
    mixed = {"sources": ["chat.jsonl", "short.jsonl"], "names": ["all", "short"]}
    (folder / "sources.yaml").write_text(json.dumps(mixed))


def config_of(folder: Path, data: Path, layout: Layout) -> Config:
    """The run of `layout` in `folder`, on what `write_data` wrote."""
    kind = KINDS[layout.kind]
    tiny(kind.family, **{"vocab_size": 2048} | kind.model).save_pretrained(folder / "kind")
    arguments = {
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "max_steps": NUM_STEPS,
        # With a small one, steps depend on the signs of gradients that are zero except for rounding.
        "adam_eps": 1e-4,
        "save_hf_weights": True,
        "data.train_path": "chat",
        **kind.arguments,
        **layout.train,
    }
    path = data / str(arguments.pop("data.train_path"))
    path = path.with_suffix(".yaml" if path.name == "sources" else ".jsonl")
    named = {name if "." in name else f"train.{name}": value for name, value in arguments.items()}
    where = {"model.config_path": str(folder / "kind"), "data.train_path": str(path)}
    return tiny_config(folder, world=layout.world, **where, **named)
