"""A loss curve that must not change: 12 steps of the tiny model in fp32, recorded from the first release.

A change to it changes training for all users. Write a new curve with `python -m tests.train.test_golden` only for a
reason that the commit message gives.
"""

import json
from pathlib import Path

import pytest

from tests.train.runs import run, tiny_config

CURVE = Path(__file__).with_name("golden.json")
CHANGES = {"train.max_steps": 12, "train.lr_warmup_ratio": 0.25, "train.weight_decay": 0.1}


def test_loss_curve_is_the_golden_one(tmp_path):
    golden = json.loads(CURVE.read_text())
    lines = run(tiny_config(tmp_path, **CHANGES))
    for key in ("loss", "grad_norm", "lr"):
        got = [line[key] for line in lines]
        assert got == pytest.approx(golden[key], rel=1e-4), key


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        curve = run(tiny_config(Path(folder), **CHANGES))
    CURVE.write_text(
        json.dumps({key: [line[key] for line in curve] for key in ("loss", "grad_norm", "lr")}, indent=1) + "\n"
    )
