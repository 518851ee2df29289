"""A sample of the sweep over transformers' sequence classifiers (`make sweep-classes`)."""

from __future__ import annotations

from tests import sweep, sweep_classes
from tests.sweep import CLASSES, EQUAL, REFUSED


def test_a_classifier_is_equal_packed_on_ranks_and_with_adapters() -> None:
    found = sweep_classes.check("qwen3")
    assert found == dict.fromkeys(sweep_classes.COLUMNS, EQUAL)


def test_a_family_whose_head_is_another_is_refused_by_name() -> None:
    found = sweep_classes.check("bert")
    assert found["packed"].startswith(f"{REFUSED}: BertForSequenceClassification has"), found
    assert "fsdp2" not in found


def test_every_family_is_on_the_page() -> None:
    table = sweep.PAGE.read_text(encoding="utf-8").partition("<!-- classes -->")[2]
    assert not [family for family in sweep.families(CLASSES) if f"| {family} |" not in table]
