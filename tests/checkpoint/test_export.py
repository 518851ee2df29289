"""`tutti export`: holds about a tensor at a time, and a folder of the final name is whole whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.faults import Died, Faults
from tests.checkpoint.weighing import CPU, ONE, on_meta
from tests.harness import run_ranks
from tests.train.runs import run, tiny_config, write_model_config
from tutti.checkpoint.hf_save import export_hf
from tutti.core import files
from tutti.model.initial import init_weights

MIB = 2**20


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def export(seed: int, folder: Path, tokenizer: Any) -> None:
    model = on_meta("llama")
    init_weights(model, seed, CPU)
    export_hf(model, folder, tokenizer, world=ONE, max_shard_gb=2e-4)


@pytest.mark.parametrize("error", [None, errno.ENOSPC])
@pytest.mark.parametrize("present", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("exchanges", [True, False], ids=["at-once", "in-two-steps"])
def test_an_export_that_is_disturbed_leaves_the_old_folder_or_the_new(
    tmp_path, tokenizer, monkeypatch, error, present, exchanges
):
    """exchanges: False where the file system can't exchange names: the next export puts the old one back."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    export(1, tmp_path / "old", tokenizer)
    export(2, tmp_path / "new", tokenizer)
    old, new = content(tmp_path / "old") if present else None, content(tmp_path / "new")
    root = tmp_path / "root"

    def begin() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if present:
            shutil.copytree(tmp_path / "old", root / "final")
        return root / "final"

    folder = begin()
    with Faults(root) as counted:
        export(2, folder, tokenizer)
    assert content(folder) == new and os.listdir(root) == ["final"]
    outcomes = []
    for at in range(len(counted.done)):
        folder = begin()
        raised: BaseException | None = None
        with Faults(root, at, error):
            try:
                export(2, folder, tokenizer)
            except (Died, ValueError, OSError) as caught:
                raised = caught
        if not folder.exists() and not exchanges:
            files.put_back_folder(folder)
        outcomes.append(content(folder) if folder.exists() else None)
        assert outcomes[-1] in (old, new), counted.done[at]
        assert raised is not None or outcomes[-1] == new, counted.done[at]
        if error is not None and raised is not None:
            assert isinstance(raised, ValueError) and os.strerror(error) in str(raised), counted.done[at]
        if at % 5 == 0:
            export(2, folder, tokenizer)
            assert content(folder) == new and os.listdir(root) == ["final"]
    assert outcomes[0] == old and outcomes[-1] == new


def peak_of_export(source: Path, out: Path) -> int:
    """How many bytes more than before an export held at most."""
    import logging

    from tutti.checkpoint.export import export

    logging.disable(logging.INFO)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    export(str(source), str(out))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_an_export_holds_few_tensors_at_a_time(tmp_path):
    """A model of 104 MiB in matrices of 8: the largest file is all of it, and an export holds a fraction."""
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    path = write_model_config(tmp_path / "wide", **wide)
    config = tiny_config(
        tmp_path,
        **{"model.config_path": path, "train.max_steps": 1, "train.save_steps": 1, "data.max_seq_len": 32},
    )
    run(config)
    (grown,) = run_ranks(1, peak_of_export, Path(config.train.output_dir), tmp_path / "hf")
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    assert size > 100 * MIB
    assert grown < 48 * MIB, f"{grown / MIB:.0f} MiB"
    assert (tmp_path / "hf/config.json").exists()
