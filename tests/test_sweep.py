"""A sample of the sweep over transformers' families (`make sweep`)."""

from __future__ import annotations

import pytest

from tests import sweep
from tests.varied import varied_config
from tutti.model import families


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "opt",
        "phi3",
        "gemma2",
        "olmo2",
        "gpt_oss",
        "qwen3_moe",
        "deepseek_v3",
        "qwen3_next",
        "nemotron_h",
        "hy_v4",
    ],
)
def test_a_family_is_equal_or_refused(family: str) -> None:
    found = sweep.check(family)
    assert set(found) == set(sweep.COLUMNS)
    assert found["packed"] == found["checkpointed"] == found["saved"] == sweep.EQUAL, found
    assert found["eager"].startswith((sweep.EQUAL, f"{sweep.REFUSED}: model.attn_implementation")), found


@pytest.mark.parametrize("family", ["granite", "deepseek_v32", "hy_v4", "inkling_text"])
def test_a_family_is_equal_with_other_features_than_by_default(family: str) -> None:
    assert sweep.check_varied(family) == sweep.EQUAL


def test_features_are_varied_as_far_as_a_class_takes_them() -> None:
    found = varied_config("granite")
    assert (found.attention_bias, found.residual_multiplier, found.tie_word_embeddings) == (True, 0.7, True)
    assert found.num_key_value_heads == 2 and found.rope_parameters["rope_type"] == "yarn"
    found = varied_config("deepseek_v3")
    assert found.n_group == 2 and found.num_key_value_heads == 4  # of latent attention there are as many as queries'
    found = varied_config("qwen2")
    assert found.layer_types == ["full_attention", "sliding_attention"] and found.sliding_window == 8


def test_what_carries_from_one_sample_into_the_next_is_refused() -> None:
    found = sweep.check("deepseek_v4")
    assert found["packed"].startswith(f"{sweep.REFUSED}: deepseek_v4 has layers of type compressed_sparse"), found
    found = sweep.check("rwkv")
    assert found["packed"].startswith(f"{sweep.REFUSED}: rwkv has layers that mix tokens otherwise"), found


def test_a_mask_of_unknown_meaning_is_refused() -> None:
    found = sweep.check("doge")
    assert found["packed"].startswith(f"{sweep.REFUSED}: DogeAttention hands on a mask of its own making"), found
    assert found["eager"] == sweep.EQUAL


def test_a_difference_is_told() -> None:
    want = (2.0, {"a": sweep.torch.ones(3)})
    assert sweep.compare((2.0, {"a": sweep.torch.ones(3)}), want) == sweep.EQUAL
    assert "loss 2.1" in sweep.compare((2.1, want[1]), want)
    assert "gradient of a" in sweep.compare((2.0, {"a": sweep.torch.tensor([1.0, 1.0, 1.01])}), want)
    assert "gradient of a" in sweep.compare((2.0, {}), want)
    page = sweep.table({"x": {"packed": sweep.EQUAL, "eager": f"{sweep.REFUSED}: a | b", "saved": sweep.EQUAL}})
    assert "| x | equal | refused |  | equal | a / b |" in page


def test_rows_of_the_page_are_replaced() -> None:
    old = sweep.table({"b": {"packed": sweep.EQUAL}, "c": {"packed": sweep.EQUAL}})
    page = f"x\n<!-- sweep -->\n{old}<!-- /sweep -->\ny"
    new = sweep.rewrite(page, {"c": {"packed": f"{sweep.REFUSED}: so"}, "a": {"packed": sweep.EQUAL}})
    rows = {"a": {"packed": sweep.EQUAL}, "b": {"packed": sweep.EQUAL}, "c": {"packed": f"{sweep.REFUSED}: so"}}
    assert new == f"x\n<!-- sweep -->\n{sweep.table(rows)}<!-- /sweep -->\ny"


def test_every_family_of_transformers_is_on_the_page() -> None:
    """A family that is new in transformers fails here: run `make sweep`."""
    assert not sweep.untried(sweep.PAGE.read_text(encoding="utf-8"))


def test_a_family_that_transformers_adds_gets_a_row_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweep.TOKENS.mapping, "brandnew", "BrandNewForCausalLM")
    page = sweep.PAGE.read_text(encoding="utf-8")
    new = sweep.untried(page)
    assert "| brandnew | untested |  |  |  | is new |" in sweep.rewrite(page, new)
    assert list(new) == ["brandnew"]


def test_runs_know_the_families_of_the_page() -> None:
    """Runs use a list of families that each sweep writes (`tests.sweep.write_compared`)."""
    found, known = set(sweep.compared()), families.COMPARED
    rows = sweep.rows_of(sweep.PAGE.read_text(encoding="utf-8"), "sweep")
    assert {"qwen3", "gemma3", "gpt_oss"} <= known <= found
    assert found & rows.keys() <= known
