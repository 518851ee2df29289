"""A sample of the sweep over transformers' families in layouts (`make sweep-layouts`)."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests import sweep, sweep_layouts
from tests.sweep import EQUAL, REFUSED


@pytest.mark.parametrize(
    ("family", "columns"),
    [
        ("gemma4_text", ("tensor",)),
        ("gemma3n_text", ("tensor", "ulysses")),  # which takes the root of hidden states' squares
        ("granite_swa", ("tensor", "pipeline", "generated")),
        ("gpt_bigcode", ("tensor, pipeline",)),  # whose decoder reshapes its output
        ("biogpt", ("pipeline",)),  # whose positions are looked up by a mask
        ("ctrl", ("pipeline",)),  # whose decoder writes into its embeddings
        ("stablelm", ("tensor",)),  # whose attention lays out keys by their number
        ("zamba", ("fsdp2",)),  # whose blocks share their attention
    ],
)
def test_a_family_trains_alike_in_layouts(family, columns):
    assert sweep_layouts.check(family, columns) == dict.fromkeys(("trained", *columns), EQUAL)


def test_layers_that_attend_twice_have_two_places_in_the_cache(tmp_path):
    """DiffLlama's, with the same keys and other values."""
    sweep_layouts.write_family("diffllama", tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path)
    assert sweep_layouts.generated(tmp_path) == EQUAL


def test_blocks_that_are_not_one_list_are_refused_before_a_step():
    found = sweep_layouts.check("hrm_text", ("tensor",))
    assert found["trained"] == EQUAL
    assert (
        found["tensor"].startswith(f"{REFUSED}: train.tensor_parallel_size: HrmText") and "one list" in found["tensor"]
    )


def test_whole_rows_are_left_out_when_resuming():
    rows = {"a": dict.fromkeys(sweep_layouts.COLUMNS[:-1], EQUAL), "b": {"trained": EQUAL}, "c": {"trained": REFUSED}}
    table = sweep.table(rows, sweep_layouts.COLUMNS)
    assert sweep_layouts.tried(f"x\n<!-- layouts -->\n{table}<!-- /layouts -->\n") == {"a", "c"}


def test_a_difference_is_told():
    want = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}]
    assert sweep_layouts.compare(want, want) == EQUAL
    assert "loss of step 1 is 2.1, not 2.0" in sweep_layouts.compare([want[0] | {"loss": 2.1}], want)
    assert "grad_norm" in sweep_layouts.compare([want[0] | {"grad_norm": 1.001}], want)
