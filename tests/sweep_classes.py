"""The sweep over transformers' sequence classifiers: each equals its own class text by text, or is refused by name.
`make sweep-classes` runs all families and writes the third table in docs/models.md.

A family is made small as in `tests.sweep`, whose columns these have; beside them *fsdp2*, two steps on two ranks as on
one, and *adapters*, the same by LoRA, from the weights that the first run exported.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from tests import sweep, sweep_layouts
from tests.sweep import CLASSES, EQUAL
from tests.train.runs import QUICKSTART
from tests.train.runs import tiny_config as run_config

COLUMNS = (*sweep.COLUMNS, "fsdp2", "adapters")
MARK = "classes"
DATA = {
    "data.data_type": "classification",
    "data.train_path": str(QUICKSTART / "topics.jsonl"),
    "model.num_labels": 4,
    "train.dyn_bsz": False,
}


def check(family: str) -> dict[str, str]:
    """The cells of a family, by column; what is refused alone is not tried on ranks."""
    found = sweep.check(family, CLASSES)
    if found["packed"] == EQUAL:
        found |= on_ranks(family)
    return found


def on_ranks(family: str) -> dict[str, str]:
    """The cells of a family in the columns of whole runs."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        start = {"model.config_path": str(sweep_layouts.write_family(family, root / "model", CLASSES))}

        def run(name: str, world: int, **changes: Any) -> tuple[str, list[dict[str, Any]], Any]:
            (root / name).mkdir()
            steps = {"train.max_steps": 2, "train.adam_eps": 1e-4, "train.lr": 1e-3}
            made = run_config(root / name, world=world, **(sweep_layouts.SMALL | DATA | steps | changes))
            return *sweep_layouts.outcome(made, world), made

        said, want, alone = run("alone", 1, **start, **{"train.save_hf_weights": True})
        if said != EQUAL:
            return {"fsdp2": said}
        said, got, _ = run("fsdp2", 2, **start, **{"train.data_parallel_mode": "fsdp2"})
        found = {"fsdp2": said if said != EQUAL else sweep_layouts.compare(got, want)}
        exported = Path(alone.train.output_dir or "") / "hf" / "final"
        given = {"model.config_path": None, "model.model_path": str(exported)}
        adapted = {"train.architecture": "lora", "train.lora_rank": 4}
        said, want, _ = run("adapters", 1, **given, **adapted)
        if said == EQUAL:
            said, got, _ = run("both", 2, **given, **adapted, **{"train.data_parallel_mode": "fsdp2"})
            said = said if said != EQUAL else sweep_layouts.compare(got, want)
        return found | {"adapters": said}


def main() -> None:
    sweep_layouts.sweep_families(__doc__, check, sweep.families(CLASSES), COLUMNS, MARK)


if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver")
    main()
