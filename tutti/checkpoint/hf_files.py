"""The weight files of a Hugging Face checkpoint: which there are, and tensors read lazily and written one by one.

A checkpoint is one `model.safetensors`, several files with an index (`model.safetensors.index.json`) that says which
holds which tensor, or the older `pytorch_model.bin` in both forms, which is memory-mapped and unpickled with nothing
but tensors allowed. Everything that can be wrong with the files is found on opening them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tutti.core.compat import str_to_torch_dtype

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
_BIN_SINGLE = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_SAMPLES, _SAMPLED_BYTES = 512, 8192
WEIGHT_FILES = (INDEX, SINGLE, _BIN_INDEX, _BIN_SINGLE)
"""Files that a folder of weights is opened by: the first of these that is there."""


def find_index(weights: str | Path | None, index_path: str | Path | None = None) -> Path | None:
    """The index to read and to export by: `index_path` if given, else the one beside the weights, if there."""
    if index_path is not None:
        return Path(index_path)
    beside = Path(weights) / INDEX if weights is not None else None
    return beside if beside is not None and beside.is_file() else None


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        assert isinstance(weight_map, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"model.safetensor_idx_path: {path} is not an index of weight files: {error}") from error
    return weight_map


def weights_digest(path: str | Path) -> str:
    """The SHA-256 of the sizes of the weight files at `path` (a folder or one file) and of samples of their bytes.

    It tells a model from what any training makes of it, without reading all of it.
    """
    path, digest = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(size * number // _SAMPLES)
                digest.update(stream.read(_SAMPLED_BYTES))
    return digest.hexdigest()


class Checkpoint:
    """An open checkpoint. `read(key)` gives something to slice: nothing is read from the file before that."""

    def __init__(self, path: Path, index_path: str | Path | None = None) -> None:
        """Open all files at `path` (a folder or a single file); ValueError names what is missing or damaged."""
        self._slices: dict[str, Any] = {}
        self._opened: list[Any] = []
        expected = self._expected(path, index_path)
        lacking = [file for file in expected if not file.is_file()]
        if lacking:
            names = ", ".join(file.name for file in lacking[:5])
            raise ValueError(f"model.model_path: {len(lacking)} of {len(expected)} weight files are not there: {names}")
        for file, keys in expected.items():
            held = self._open(file)
            gone = [key for key in keys or () if key not in held]
            if gone:
                raise ValueError(
                    f"model.model_path: {file} lacks {gone[0]} and {len(gone) - 1} more that the index names"
                )
            self._slices.update(held)

    def read(self, key: str) -> Any:
        """The tensor of this key, unread: index it."""
        return self._slices[key]

    def meta(self) -> dict[str, Tensor]:
        """Every key with a meta tensor of its shape and dtype."""
        return {key: _meta(value) for key, value in self._slices.items()}

    @staticmethod
    def _expected(path: Path, index_path: str | Path | None) -> dict[Path, list[str] | None]:
        """The files, each with the keys that an index says it holds (None: no index)."""
        if path.is_file():
            return {path: None}
        first = find_index(path, index_path) or next(
            (path / name for name in WEIGHT_FILES if (path / name).is_file()), None
        )
        if first is None:
            raise ValueError(f"model.model_path: no weights in {path} ({SINGLE}, or {INDEX} and its files)")
        if first.suffix != ".json":
            return {first: None}
        files: dict[Path, list[str] | None] = {}
        for key, name in read_index(first).items():
            keys = files.setdefault(path / name, [])
            assert keys is not None
            keys.append(key)
        return files

    def _open(self, file: Path) -> Mapping[str, Any]:
        try:
            if file.suffix == ".bin":
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            handle = safe_open(file, framework="pt", device="cpu")
            self._opened.append(handle)
            return {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  # no mapping
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = reason_of_refusal(error)
            raise ValueError(f"model.model_path: {file} is damaged or no weight file: {reason}") from error


class RestOfCheckpoint(Checkpoint):
    """The tensors in an open checkpoint whose keys do not begin with `prefix`."""

    def __init__(self, path: Path, prefix: str) -> None:
        super().__init__(path)
        self._slices = {key: value for key, value in self._slices.items() if not key.startswith(prefix)}


class PartOfCheckpoint(Checkpoint):
    """The tensors in an open checkpoint that belong to a part of its model: those below the prefix under which all of
    `names` are there. All of them, with their own names, where there is no such prefix."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        super().__init__(path)
        wanted = set(names)
        longest = max(wanted, key=len)
        prefixes = [key.removesuffix(longest) for key in self._slices if f".{key}".endswith(f".{longest}")]
        prefix = next((one for one in prefixes if all(one + name in self._slices for name in wanted)), "")
        self._slices = {
            key.removeprefix(prefix): value for key, value in self._slices.items() if key.startswith(prefix)
        }


def reason_of_refusal(error: BaseException) -> str:
    """The reason why a file of tensors was not read, in one line and without torch's advice to trust it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if not isinstance(error, pickle.UnpicklingError):
        return lines[0]
    named = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?|function) ([\w.]+\.[\w.]+)", str(error))
    return f"it names {named[1]}, which is no tensor" if named else "it holds something else than tensors"


def _meta(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    return torch.empty(value.get_shape(), dtype=str_to_torch_dtype[value.get_dtype()], device="meta")


class TensorFile:
    """A safetensors file that is written tensor by tensor, in any order: nothing of it is held in memory.

    Its header, which says where each tensor lies, comes first and follows from shapes and dtypes alone.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """tensors: all that the file is to hold; only their shapes and dtypes matter. OSError: it cannot be written."""
        self._path = path
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first, so that every tensor begins at a multiple of its dtype's width.
        for key in sorted(tensors, key=lambda key: (-tensors[key].element_size(), key)):
            tensor = tensors[key]
            self._places[key] = end
            places = [end, end + tensor.nbytes]
            header[key] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
            end += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._stream = path.open("wb")
        with self._naming_the_path():
            self._stream.write(len(text).to_bytes(8, "little") + text)

    def write(self, key: str, tensor: Tensor) -> bool:
        """Write one tensor; True if it was the last, and the file is now on stable storage and closed."""
        with self._naming_the_path():
            self._stream.seek(self._begin + self._places.pop(key))
            self._stream.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if self._places:
                return False
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            return True

    @contextmanager
    def _naming_the_path(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
