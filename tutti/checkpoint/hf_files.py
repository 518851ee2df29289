"""The weight files of a Hugging Face checkpoint: finding them, reading tensors lazily, and writing tensors one by one.

A checkpoint is one `model.safetensors`, several files with an index (`model.safetensors.index.json`) of which tensor is
where, or the older `pytorch_model.bin` in both forms, which is memory-mapped and unpickled with only tensors allowed.
All errors in the files are found on opening them.
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

from tutti.checkpoint.read_ahead import Span
from tutti.core.compat import str_to_torch_dtype

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPE_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}
_BIN_SINGLE = "pytorch_model.bin"
_BIN_INDEX = "pytorch_model.bin.index.json"
_SAMPLES, _SAMPLED_BYTES = 512, 8192
WEIGHT_FILES = (INDEX, SINGLE, _BIN_INDEX, _BIN_SINGLE)
"""File names with which a folder of weights is opened: the first existing one is used."""


def find_index(weights: str | Path | None, index_path: str | Path | None = None) -> Path | None:
    """The index for reading and exporting: `index_path` if given, else the one next to the weights, if any."""
    if index_path is not None:
        return Path(index_path)
    beside = Path(weights) / INDEX if weights is not None else None
    return beside if beside is not None and beside.is_file() else None


def read_index(path: Path) -> dict[str, str]:
    """The index as a mapping from tensor name to file name."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        assert isinstance(weight_map, dict)
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"model.safetensor_idx_path: {path} is not an index of weight files: {error}") from error
    return weight_map


def weights_digest(path: str | Path) -> str:
    """The SHA-256 of the sizes of the weight files at `path` (a folder or one file) and of samples of their bytes.

    It distinguishes a model from any further trained version, without reading all of it.
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
    """An open checkpoint. `read(key)` returns a lazy tensor: slicing it reads from the file."""

    def __init__(self, path: Path, index_path: str | Path | None = None) -> None:
        """Open all files at `path` (a folder or a single file); ValueError names what is missing or damaged."""
        self._slices: dict[str, Any] = {}
        self._opened: list[Any] = []
        self._spans: dict[int, Span] = {}  # of slices, by their identity: subclasses give them other keys
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
        """The lazy tensor of this key: index it to read."""
        return self._slices[key]

    def span(self, key: str, rows: slice | None = None) -> Span | None:
        """The bytes of the tensor of this key, or of its `rows`, in its file; None for the older format."""
        span = self._spans.get(id(self._slices[key]))
        if span is None or rows is None or rows.stop is None:
            return span
        row_bytes = (span.end - span.begin) // max(1, self._slices[key].get_shape()[0])
        return Span(span.file, span.begin + rows.start * row_bytes, span.begin + rows.stop * row_bytes)

    def meta(self) -> dict[str, Tensor]:
        """A meta tensor for every key."""
        return {key: _meta(value) for key, value in self._slices.items()}

    @staticmethod
    def _expected(path: Path, index_path: str | Path | None) -> dict[Path, list[str] | None]:
        """The files, each with its keys according to the index (None: no index)."""
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
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118  # no mapping
            self._spans |= {id(slices[key]): span for key, span in _spans(file).items()}
            return slices
        except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            reason = reason_of_refusal(error)
            raise ValueError(f"model.model_path: {file} is damaged or no weight file: {reason}") from error


def _spans(file: Path) -> dict[str, Span]:
    """The bytes of each tensor in a safetensors file, by its key."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    places = {key: entry["data_offsets"] for key, entry in header.items()}
    return {key: Span(file, 8 + size + begin, 8 + size + end) for key, (begin, end) in places.items()}


class RestOfCheckpoint(Checkpoint):
    """The part of a checkpoint whose keys do not begin with `prefix`."""

    def __init__(self, path: Path, prefix: str) -> None:
        super().__init__(path)
        self._slices = {key: value for key, value in self._slices.items() if not key.startswith(prefix)}


class PartOfCheckpoint(Checkpoint):
    """The tensors of one part of a checkpoint's model: those under the prefix with which all of `names` exist. If
    there is no such prefix, all tensors under their own names."""

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
    """The reason why a tensor file was rejected, in one line and without torch's advice to trust it."""
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
    """A safetensors file that is written tensor by tensor, in any order, without holding any of it in memory.

    Its header, which says where each tensor is, comes first and follows from shapes and dtypes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """tensors: everything that the file will contain; only shapes and dtypes matter. OSError: it cannot be
        written."""
        self._path = path
        self._places: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first, so that every tensor is aligned to its dtype.
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
        """Write one tensor; returns True if it was the last one, and the file is now closed and on stable storage."""
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
