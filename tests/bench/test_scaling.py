"""The data that layouts send along each axis, counted on tiny models, equals the formulas of bench.volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import scaling
from bench._ranks import run
from bench.scaling import LAYOUTS, Layout, mean_sent
from bench.volume import volume

SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4, "vocab_size": 512}
BY_NAME = {layout.name: layout for layout in LAYOUTS}
CHOSEN = (
    BY_NAME["zero-2, 2"],
    BY_NAME["ulysses 2, async"],
    BY_NAME["replicate 2 x ulysses 2"],
    BY_NAME["zero-3, 2 x tensor 2"],
    BY_NAME["tensor 2 x pipeline 2"],
    Layout("context 2 x pipeline 2", 4, {"context": 2, "pipeline": 2}),
    BY_NAME["MoE, zero-3, 4 x expert 2"],
    BY_NAME["MoE, zero-3, 2 x tensor 2 x expert 4"],
)


@pytest.mark.parametrize("layout", CHOSEN, ids=lambda layout: layout.name)
def test_nothing_is_sent_that_need_not_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    monkeypatch.setattr(scaling, "LENGTH", 64)
    monkeypatch.setattr(scaling, "DENSE", scaling.DENSE | SMALL)
    monkeypatch.setattr(scaling, "MOE", scaling.MOE | SMALL | {"moe_intermediate_size": 32})
    scaling.write_samples(tmp_path / layout.kind, layout.model, 64, scaling.SAMPLES)
    counted, formula = mean_sent(run(layout.job(tmp_path, warmup=1, steps=0))), volume(layout.model, layout.setting)
    assert counted.keys() == formula.keys()
    for axis, (size, messages) in formula.items():
        # The router decides where tokens go, which may be uneven.
        assert counted[axis][0] == pytest.approx(size, rel=0.5 if axis == "expert" else 1e-3), axis
        assert counted[axis][1] == pytest.approx(messages), axis
