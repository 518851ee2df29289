"""A sample of the sweep over families that take media (`make sweep-media`)."""

from __future__ import annotations

from pathlib import Path

from tests import sweep_multimodal
from tests.model.test_recordings import write_files
from tests.sweep import EQUAL


def test_a_family_is_compared_with_its_class(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert sweep_multimodal.compared("llava", tmp_path) == {"alone": EQUAL, "packed": EQUAL}
