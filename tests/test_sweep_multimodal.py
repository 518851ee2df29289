"""The table of families with media in the docs: every one that there is a tiny processor of, equal or refused."""

from __future__ import annotations

from pathlib import Path

from tests import sweep_multimodal
from tests.model.test_recordings import write_files
from tests.sweep import EQUAL, FAILED


def test_every_family_is_on_the_page() -> None:
    """One that is missing is written by `make sweep-media`."""
    table = sweep_multimodal.PAGE.read_text(encoding="utf-8").partition("<!-- media -->")[2].partition("<!-- /media")[0]
    rows = [row for row in table.splitlines() if row.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == sweep_multimodal.families()
    assert FAILED not in table and all(row.count(f" {EQUAL} ") >= 6 for row in rows)


def test_a_family_is_compared_with_its_class(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert sweep_multimodal.compared("llava", tmp_path) == {"alone": EQUAL, "packed": EQUAL}
