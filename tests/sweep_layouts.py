"""The sweep over transformers' families, in layouts: two steps on two ranks equal those of one process, or are refused
by name before the first. `make sweep-layouts` runs all families and writes the second table in docs/models.md.

A family is made small as in `tests.sweep`, and starts from the random weights of its class, so that what it takes to
initialise them is tried too. `--resume --seconds 150` goes on where an earlier call stopped. Columns: *trained*, one
process, with activation checkpointing; *adapters*, by LoRA; *generated*, greedy answers as transformers gives them for
what the run exported; and an axis of two ranks each.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.sweep import (
    EQUAL,
    FAILED,
    PAGE,
    REFUSED,
    TOKENS,
    UNTESTED,
    Kind,
    families,
    require_tiny,
    rewrite,
    rows_of,
    tiny_config,
    write_compared,
)
from tests.train.runs import QUICKSTART, records, train_quietly
from tests.train.runs import tiny_config as run_config

ZERO3 = {"data_parallel_mode": "fsdp2"}
AXES: dict[str, dict[str, Any]] = {
    "fsdp2": ZERO3,
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "ulysses": {"ulysses_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "expert": ZERO3 | {"expert_parallel_size": 2},
}
TOGETHER: dict[str, dict[str, Any]] = {"tensor, pipeline": AXES["tensor"] | AXES["pipeline"]}
"""Layouts of four ranks, which are in no table."""

COLUMNS = ("trained", "adapters", "generated", *AXES)
MARK = "layouts"
SMALL = {"data.max_seq_len": 64, "train.global_batch_size": 4}
"""Two micro batches a step, of two samples or more."""
USERS = ("ConfigError: ", "ValueError: ", "OtherRankError: ")
"""The errors that count as clear messages to users."""

VOCAB = 2048


def write_family(family: str, folder: Path, kind: Kind = TOKENS) -> Path:
    """The tiny config of a family, for texts of the quickstart's tokenizer, in a folder with this."""
    config = tiny_config(family)
    config.vocab_size = VOCAB
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = VOCAB
    config.eos_token_id, config.pad_token_id = 2, 0
    require_tiny(config, kind)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART / name, folder)
    return folder


def outcome(config: Any, world: int) -> tuple[str, list[dict[str, Any]]]:
    """Equal as far as it ran, or why it did not; and its metrics lines."""
    try:
        run_ranks(world, train_quietly, config, timeout=100)
    except (AssertionError, TimeoutError) as error:
        lines = [line for line in str(error).strip().splitlines() if not line.startswith("(")]  # which are notes
        last = lines[-1].split(" [rank")[0]
        metrics = Path(config.train.output_dir or "") / "metrics.jsonl"
        begun = metrics.is_file() and "grad_norm" in metrics.read_text()
        name = next((name for name in USERS if name in last), None)
        if name is not None and not begun:
            return f"{REFUSED}: {last.partition(name)[2]}", []
        return f"{FAILED}: {last}", []
    return EQUAL, records(config)


def compare(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> str:
    """Equal, or what differs first in two runs' metrics lines."""
    for ours, theirs in zip(got, want, strict=True):
        for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
            if ours[key] != pytest.approx(theirs[key], rel=tolerance):
                return f"{FAILED}: {key} of step {ours['step']} is {ours[key]}, not {theirs[key]}"
    return EQUAL


def check(family: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """The cells of a family, by column."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = write_family(family, root / "model")
        found: dict[str, str] = {}

        # With a smaller adam_eps, steps depend on the signs of gradients that are zero but for rounding.
        def run(name: str, world: int, where: dict[str, Any], **train: Any) -> tuple[str, list[dict[str, Any]], Any]:
            (root / name).mkdir()
            changes = {
                f"train.{key}": value for key, value in ({"max_steps": 2, "adam_eps": 1e-4, "lr": 1e-3} | train).items()
            }
            made = run_config(root / name, world=world, **SMALL, **where, **changes)
            return *outcome(made, world), made

        start = {"model.config_path": str(model)}
        found["trained"], want, alone = run("trained", 1, start, save_hf_weights=True)
        if found["trained"] != EQUAL:
            return found
        remat, lines, _ = run("again", 1, start, enable_gradient_checkpointing=True)
        found["trained"] = remat if remat != EQUAL else compare(lines, want)
        exported = Path(alone.train.output_dir or "") / "hf" / "final"
        if "adapters" in columns:
            given = {"model.config_path": None, "model.model_path": str(exported)}
            found["adapters"] = run("adapters", 1, given, architecture="lora", lora_rank=4)[0]
        if "generated" in columns:
            found["generated"] = _said(lambda: generated(exported))
        for name, axes in (AXES | TOGETHER).items():
            if name not in columns or (name == "expert" and not _has_experts(exported)):
                continue
            said, lines, _ = run(name, 4 if name in TOGETHER else 2, start, **axes)
            found[name] = said if said != EQUAL else compare(lines, want)
        return found


def _said(action: Callable[[], str]) -> str:
    try:
        return action()
    except ValueError as error:
        return f"{REFUSED}: {error}"
    except Exception as error:
        return f"{FAILED}: {type(error).__name__}: {error}"


def _has_experts(folder: Path) -> bool:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tutti.model.structure import experts

    with torch.device("meta"):
        return bool(experts(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))))


def generated(folder: Path) -> str:
    """Greedy answers to prompts of two lengths, beside transformers' own to each alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.infer.models import ONE, open_model
    from tutti.infer.generate import Generator, Request
    from tutti.infer.hf_generate import GeneratedLogits
    from tutti.infer.media import MediaInputs
    from tutti.infer.sampling import Sampler

    config, loaded = open_model(str(folder), do_sample=False)
    prompts = [[5, 9, 200, 31], [17, 40, 41, 300, 301, 77, 5, 9, 13, 800]]
    logits = loaded.logits
    if isinstance(logits, GeneratedLogits):  # no token is to end an answer
        logits = GeneratedLogits(loaded.model, frozenset(), MediaInputs(None))
    generator = Generator(logits, Sampler.of(config.infer), frozenset(), ONE, 10_000)
    made: dict[int, list[int]] = {0: [], 1: []}
    for token in generator.stream([Request(number, ids, 6) for number, ids in enumerate(prompts)]):
        made[token.number].append(token.id)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        own = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            eos_token_id=plain.config.get_text_config().vocab_size,
            pad_token_id=0,
        )
        if own[0, len(prompt) :].tolist() != made[number]:
            return f"{FAILED}: {made[number]}, not {own[0, len(prompt) :].tolist()}"
    return EQUAL


def tried(page: str, columns: tuple[str, ...] = COLUMNS, mark: str = MARK) -> set[str]:
    """The families that the table at `mark` of `page` has a whole row of: nothing is left to try in it."""
    found = set()
    for family, cells in rows_of(page, mark).items():
        filled = dict(zip(columns, cells, strict=False))
        if cells[0] != EQUAL or all(cell for column, cell in filled.items() if column != "expert"):
            found.add(family)
    return found


def sweep_families(
    description: str | None,
    check: Callable[[str], dict[str, str]],
    all_families: list[str],
    columns: tuple[str, ...],
    mark: str,
    page: Path = PAGE,
) -> None:
    """Write the rows of the families that the command line asks for into the table at `mark` of `page`, one by one.

    Of a family whose config can't be made small the first column tells so.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, whose rows of the page are written (default: all)")
    parser.add_argument("--resume", action="store_true", help="leave out those that have a whole row already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin none after so long")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    done = tried(page.read_text(encoding="utf-8"), columns, mark) if options.resume else set()
    begun = time.monotonic()
    for name in (name for name in options.families or all_families if name not in done):
        if time.monotonic() - begun > options.seconds:
            break
        try:
            found = check(name)
        except Exception as error:
            found = {columns[0]: f"{UNTESTED}: {type(error).__name__}: {error}"}
        print(name, found, flush=True)
        page.write_text(rewrite(page.read_text(encoding="utf-8"), {name: found}, columns, mark), encoding="utf-8")
    write_compared()


if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    sweep_families(__doc__, check, families(), COLUMNS, MARK)
