"""`tutti export` holds about one tensor at a time, and a folder with the final name is always complete."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tests.checkpoint.faults import Died, Faults
from tests.checkpoint.weighing import CPU, ONE, on_meta
from tests.harness import run_ranks
from tests.train.runs import tiny_config, train_quietly, write_model_config
from tutti.checkpoint.hf_save import export_hf
from tutti.config import Config
from tutti.core import files
from tutti.model.initialize import init_weights

MIB = 2**20


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CASES = {
    "new": (None, False, True),
    "replaced": (None, True, True),
    "replaced-in-two-steps": (None, True, False),
    "full-disk": (errno.ENOSPC, True, True),
}
"""The end of a disturbed file operation (None: the process ends), whether there is a folder already, and whether
the file system exchanges two names; where it can't, the next export puts the old folder back."""
if os.environ.get("SOAK"):
    CASES |= {"full-disk-in-two-steps": (errno.ENOSPC, True, False), "broken-disk-new": (errno.EIO, False, True)}


@pytest.mark.parametrize(("error", "present", "exchanges"), CASES.values(), ids=CASES)
def test_an_export_that_is_disturbed_leaves_the_old_folder_or_the_new(
    tmp_path, tokenizer, monkeypatch, error, present, exchanges
):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    models = [on_meta("llama") for _ in range(2)]
    for seed, (model, name) in enumerate(zip(models, ("old", "new"), strict=True)):
        init_weights(model, seed, CPU)
        export_hf(model, tmp_path / name, tokenizer, world=ONE)
    old, new = content(tmp_path / "old") if present else None, content(tmp_path / "new")
    root = tmp_path / "root"

    def begin() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if present:
            shutil.copytree(tmp_path / "old", root / "final")
        return root / "final"

    def export() -> None:
        export_hf(models[1], root / "final", tokenizer, world=ONE)

    folder = begin()
    with Faults(root) as counted:
        export()
    assert content(folder) == new and os.listdir(root) == ["final"]
    outcomes = []
    for at in range(len(counted.done)):
        folder = begin()
        raised: BaseException | None = None
        with Faults(root, at, error):
            try:
                export()
            except (Died, ValueError, OSError) as caught:
                raised = caught
        if not folder.exists() and not exchanges:
            files.put_back_folder(folder)
        outcomes.append(content(folder) if folder.exists() else None)
        assert outcomes[-1] in (old, new), counted.done[at]
        assert raised is not None or outcomes[-1] == new, counted.done[at]
        if error is not None and raised is not None:
            assert isinstance(raised, ValueError) and os.strerror(error) in str(raised), counted.done[at]
        if at % 8 == 0:
            export()
            assert content(folder) == new and os.listdir(root) == ["final"]
    assert outcomes[0] == old and outcomes[-1] == new


def train_both(*configs: Config) -> None:
    os.environ.pop("RANK")
    for config in configs:
        train_quietly(config)


def peak_of_export(small: Path, source: Path, out: Path) -> int:
    """The bytes more than before that an export of `source` held at most; `small` is exported first, for what is loaded
    but once."""
    import logging

    from tutti.kinds.export import export

    logging.disable(logging.INFO)
    os.environ.pop("RANK")  # each export makes a group of its own
    export(str(small), str(out.with_name("hf-small")))
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    export(str(source), str(out))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_an_export_holds_few_tensors_at_a_time(tmp_path):
    """A model of 64 MiB with matrices of 4 MiB: it is a single file, but an export holds only a fraction."""
    wide = {"hidden_size": 256, "intermediate_size": 4096, "num_hidden_layers": 5}
    path = write_model_config(tmp_path / "wide", **wide)
    config = tiny_config(
        tmp_path,
        **{"model.config_path": path, "train.max_steps": 1, "train.save_steps": 1, "data.max_seq_len": 32},
    )
    small = tiny_config(tmp_path / "small", **{"train.max_steps": 1, "train.save_steps": 1, "data.max_seq_len": 32})
    run_ranks(1, train_both, small, config)
    sources = (Path(one.train.output_dir) for one in (small, config))
    (grown,) = run_ranks(1, peak_of_export, *sources, tmp_path / "hf")
    size = (tmp_path / "hf/model.safetensors").stat().st_size
    assert size > 60 * MIB
    assert grown < 30 * MIB, f"{grown / MIB:.0f} MiB"
    assert (tmp_path / "hf/config.json").exists()
