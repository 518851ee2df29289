"""Untrusted checkpoints: no pickle in them runs code, and modified checkpoints are never loaded silently."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoint.tiny import assert_same, build, checkpointer, everything, forge, saved
from tutti.checkpoint import dcp
from tutti.checkpoint.hf_files import Checkpoint

CORRUPTIONS = 3000 if os.environ.get("SOAK") else 300


class Reduced:
    """Unpickles to a call of `function`, which need not be importable here."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def by_name(module: str, name: str, *args: str) -> bytes:
    """A pickle, written by hand, that calls module.name(*args)."""
    pushed = b"".join(b"V" + arg.encode() + b"\n" for arg in args)
    return f"c{module}\n{name}\n(".encode() + pushed + b"tR."


def hostile(mark: Path) -> dict[str, bytes]:
    """Pickles that create the file `mark`, or prepare another pickle to do so, by method."""
    touch, command = f"open({str(mark)!r}, 'w').close()", f"touch {mark}"
    stacked = (
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + b"\x8c" + bytes([len(command)]) + command.encode() + b"\x85R."
    )
    built = pickle.dumps({"a": 1})[:-1] + b"0" + by_name("os", "system", command)
    return {
        "os.system": by_name("os", "system", command),
        "posix.system": by_name("posix", "system", command),
        "stack-global": stacked,
        "eval": by_name("builtins", "eval", touch),
        "exec": by_name("builtins", "exec", touch),
        "python-2-eval": by_name("__builtin__", "eval", touch),
        "open": by_name("io", "open", str(mark), "w"),
        "path-touch": pickle.dumps(Reduced(Path.touch, mark)),
        "getattr": by_name("builtins", "getattr", "a", "b"),
        "import-module": by_name("importlib", "import_module", "antigravity"),
        "popen": by_name("subprocess", "getoutput", command),
        "run-path": by_name("runpy", "run_path", str(mark)),
        "loads": by_name("pickle", "loads", touch),
        "torch-load": by_name("torch", "load", str(mark)),
        "torch-hub": by_name("torch.hub", "_get_cache_or_reload", command),
        "numpy-load": by_name("numpy", "load", str(mark)),
        "partial": by_name("functools", "partial", touch),
        "timeit": by_name("timeit", "timeit", touch),
        "code": by_name("code", "InteractiveInterpreter", touch),
        "cdll": by_name("ctypes", "CDLL", str(mark)),
        "persistent-id": b"P" + command.encode() + b"\n.",
        "dotted": by_name("torch", "serialization.os.system", command),
        "inst": b"(V" + command.encode() + b"\nios\nsystem\n.",
        "after-a-value": built,
    }


NAMES = sorted(hostile(Path("mark")))


def tensor_file(pickled: bytes) -> bytes:
    """A file of torch.save, with another pickle in it."""
    stream, forged = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(1), stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(forged, "w") as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))
    return forged.getvalue()


@pytest.fixture
def mark(tmp_path):
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "a pickle ran code"


@pytest.fixture
def checkpoint(tmp_path, one_rank):
    _, _, keeper = saved(tmp_path, one_rank, 1)
    return tmp_path / "checkpoints/global_step_1", keeper


def test_the_pickles_would_do_harm(tmp_path):
    """Without this, the tests below would prove nothing."""
    harmed = 0
    for name in ("os.system", "posix.system", "stack-global", "eval", "exec", "open", "path-touch", "popen", "inst"):
        path = tmp_path / name
        pickle.loads(hostile(path)[name])
        harmed += path.exists()
    assert harmed == 9 and len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_from_the_index_of_a_checkpoint(checkpoint, mark, name):
    folder, keeper = checkpoint
    forge(folder, ".metadata", hostile(mark)[name])
    with pytest.raises(ValueError, match=r"\.metadata is not the index of a checkpoint: "):
        keeper.resume(str(folder), *build("plain"))


def test_no_pickle_runs_from_within_an_index(checkpoint, mark):
    folder, keeper = checkpoint
    index = dcp.read_index(folder)
    index.planner_data = Reduced(Path.touch, mark)
    forge(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match=r"\.metadata is not the index of a checkpoint: it names pathlib"):
        keeper.resume(str(folder), *build("plain"))


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_from_a_tensor_of_a_checkpoint(checkpoint, mark, name):
    folder, keeper = checkpoint
    content = tensor_file(hostile(mark)[name])
    index = dcp.read_index(folder)
    for place in index.storage_data.values():
        place.relative_path, place.offset, place.length = "__0_0.distcp", 0, len(content)
    forge(folder, "__0_0.distcp", content)
    forge(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match=r"global_step_1: a tensor cannot be read from it: [^\n]*$"):
        keeper.resume(str(folder), *build("plain"))


@pytest.mark.parametrize("name", NAMES)
def test_no_pickle_runs_from_a_weight_file(tmp_path, mark, name):
    for content in (tensor_file(hostile(mark)[name]), hostile(mark)[name]):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or no weight file: [^\n]*$"):
            Checkpoint(tmp_path)


def corruptions(seed: int, count: int) -> list[tuple[str, Callable[[Path, random.Random], None]]]:
    kinds: dict[str, Callable[[Path, random.Random], None]] = {
        "bit": lambda path, draw: patch(path, draw, lambda byte: byte ^ (1 << draw.randrange(8))),
        "byte": lambda path, draw: patch(path, draw, lambda byte: draw.randrange(256)),
        "digit": lambda path, draw: swap_digit(path, draw),
        "cut": lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)]),
        "longer": lambda path, draw: path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9))),
        "zeros": zero_block,
        "gone": lambda path, draw: path.unlink(),
        "other": lambda path, draw: shutil.copy(draw.choice(sorted(set(path.parent.iterdir()) - {path})), path),
    }
    draw = random.Random(seed)
    return [draw.choice(list(kinds.items())) for _ in range(count)]


def patch(path: Path, draw: random.Random, change: Callable[[int], int]) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] = change(content[place])
    path.write_bytes(content)


def swap_digit(path: Path, draw: random.Random) -> None:
    """Change a number, so that the text stays valid JSON."""
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    if places:
        content[draw.choice(places)] = ord(draw.choice("0123456789"))
    path.write_bytes(content)


def zero_block(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def test_no_corruption_is_loaded_silently(tmp_path, one_rank):
    """Either the checkpoint is refused by name and `auto` uses the one before, or the change has no effect."""
    _, _, keeper = saved(tmp_path, one_rank, 1, 2)
    whole, folder = tmp_path / "whole", tmp_path / "checkpoints/global_step_2"
    shutil.copytree(folder, whole)
    model, optimizer = build("plain", seed=4)
    keeper.resume(str(folder), model, optimizer)
    want = everything(model, optimizer)
    draw = random.Random(0)
    refused = 0
    for number, (kind, corrupt) in enumerate(corruptions(0, CORRUPTIONS)):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        name = draw.choice(sorted(path.name for path in whole.iterdir()))
        corrupt(folder / name, draw)
        before = everything(model, optimizer)
        try:
            state = keeper.resume(str(folder), model, optimizer)
        except ValueError as error:
            refused += 1
            assert "global_step_2" in str(error), f"{number}: {kind} in {name}"
            assert_same(everything(model, optimizer), before)
            if refused % 20 == 0:
                other, resumed = build("plain", seed=5)
                assert keeper.resume("auto", other, resumed) == {"step": 1}
        else:
            assert state == {"step": 2}, f"{number}: {kind} in {name}"
            assert_same(everything(model, optimizer), want)
            same = json_equal if name == "manifest.json" else bytes.__eq__
            assert same((folder / name).read_bytes(), (whole / name).read_bytes()), f"{number}: {kind} in {name}"
    assert refused > 0.8 * CORRUPTIONS


def json_equal(one: bytes, other: bytes) -> bool:
    import json

    return json.loads(one) == json.loads(other)


def test_a_manifest_is_refused_in_any_shape(tmp_path, one_rank):
    _, _, keeper = saved(tmp_path, one_rank, 1)
    folder = tmp_path / "checkpoints/global_step_1"
    shapes = ["[]", "1", "null", '{"format": 1}', "[" * 10_000, '{"format": 1, "files": [], "step": 1}', "\ud800"]
    for text in shapes:
        (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
            keeper.resume(str(folder), *build("plain"))


@pytest.mark.parametrize("save_async", [False, True])
def test_numbers_that_are_not_finite_are_not_saved(tmp_path, one_rank, save_async):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1, save_async=save_async)

    def save() -> None:
        keeper.save(2, model, optimizer, {})
        keeper.wait()

    with torch.no_grad():
        model.body[0].weight[0, 0] = np.inf
    with pytest.raises(ValueError, match=r"step 2 left numbers that are not finite in model\.body\.0\.weight, and"):
        save()
    with torch.no_grad():
        model.body[0].weight[0, 0] = 1.0
    optimizer.state[model.scale]["exp_avg_sq"].fill_(torch.nan)
    with pytest.raises(ValueError, match=r"optimizer\.scale\.exp_avg_sq"):
        save()
    assert checkpointer(tmp_path, one_rank).latest() == tmp_path / "checkpoints/global_step_1"
