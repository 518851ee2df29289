"""Writing named tensors to a folder and reading them, in torch's distributed checkpoint format.

Every rank writes its parts into its own files, and rank 0 an index (`.metadata`) of where each part of each tensor is;
a reader takes whatever its own layout needs. Two things differ from torch's own reader and writer:

- A checkpoint may come from anybody, and unpickling runs code. The index, which is a pickle, is read with an unpickler
  that only allows the classes of an index, and entries that are not tensors, which torch would unpickle freely, are
  refused. Tensors are read with weights_only.
- The parts can be given as copies in host memory. The live tensors then only define where each part belongs, and may
  change while it is being written.

Also, a file that cannot be written is an OSError with its path and cause; torch's serialization, which writes through
C++, would replace it by an error about positions.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from tutti.checkpoint.hf_files import reason_of_refusal
from tutti.core.compat import StorageInfo
from tutti.core.files import describe_error
from tutti.core.tensors import local_part

INDEX = ".metadata"

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
}


def copy_to_host(tensors: Mapping[str, Tensor], copies: dict[str, Tensor]) -> None:
    """Copy this rank's part of each tensor into `copies`, reusing its memory where it fits: allocating costs several
    times as much as copying, and an accelerator copies fastest into page-locked memory."""
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    for name in copies.keys() - parts.keys():
        del copies[name]
    for name, part in parts.items():
        held = copies.get(name)
        if held is None or (held.shape, held.dtype) != (part.shape, part.dtype):
            shape = torch.contiguous_format  # a part may be a view with gaps
            copies[name] = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda, memory_format=shape)
        copies[name].copy_(part, non_blocking=part.is_cuda)
    if any(part.is_cuda for part in parts.values()):
        torch.cuda.synchronize()


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor] | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write `tensors` into `folder`, on stable storage when this returns; every rank of `group` calls this.

    copies: from `copy_to_host`, to be written instead. If a rank fails, the first one's error is raised on all ranks.
    """
    # Copies need no staging, which on CUDA would use the current device of whatever thread this is.
    writer = _Writer(folder) if copies is None else _Writer(folder, per_thread_copy_ahead=0)
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=_Planner(copies), process_group=group)
    except dcp.CheckpointException as error:
        rank, cause = _first_cause(error)
        if isinstance(cause, (OSError, ValueError)):
            raise ValueError(f"{describe_error(cause)}{f' (rank {rank})' if rank else ''}") from error
        raise RuntimeError(f"rank {rank}: {type(cause).__name__}: {cause}") from error


def files_of(folder: Path, rank: int) -> list[Path]:
    """The files that `write` made on `rank`."""
    return sorted(folder.glob(f"__{rank}_*.distcp")) + ([folder / INDEX] if rank == 0 else [])


def read_index(folder: Path) -> Metadata:
    """The index of `folder`. ValueError: it contains something other than an index of tensors."""
    path = folder / INDEX
    try:
        with path.open("rb") as stream:
            index = _IndexUnpickler(stream).load()
        assert isinstance(index, Metadata)
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(name, str) or not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
        for key, place in index.storage_data.items():
            if not isinstance(key, MetadataIndex) or not isinstance(place, StorageInfo):
                raise ValueError("a place in the files is not described as one")
            if place.transform_descriptors or Path(place.relative_path).name != place.relative_path:
                raise ValueError(f"it refers to a file outside the checkpoint: {place.relative_path}")
    except Exception as error:  # a manipulated pickle can fail in any way
        raise ValueError(f"{path} is not the index of a checkpoint: {error}") from None
    return index


def read(folder: Path, index: Metadata, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Read `tensors` in place from `folder`; every rank of `group` calls this.

    index: from `read_index`; it must contain every name, in the same shape.
    """
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(dict(tensors), storage_reader=_Reader(folder, index), planner=planner, process_group=group)
    except dcp.CheckpointException as error:
        _, cause = _first_cause(error)
        raise ValueError(f"{folder}: a tensor cannot be read from it: {reason_of_refusal(cause)}") from error


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.fs = _Files()

    def storage_meta(self) -> StorageMeta:
        """torch's version records the folder's path, which is a temporary one."""
        return StorageMeta(save_id=self.save_id)


class _Files(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        stream = None
        try:
            with super().create_stream(path, mode) as file:
                stream = _Stream(file)
                yield stream
        except Exception as error:
            cause = error if isinstance(error, OSError) else stream and stream.error
            if cause is None:
                raise
            raise OSError(cause.errno, cause.strerror, str(path)) from error


class _Stream:
    """A stream that remembers the first error of writing to it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Planner(dcp.DefaultSavePlanner):
    def __init__(self, copies: Mapping[str, Tensor] | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Any:
        return super().lookup_object(index) if self._copies is None else self._copies[index.fqn]


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self) -> Metadata:
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place there")


def _first_cause(error: dcp.CheckpointException) -> tuple[int, BaseException]:
    """The first rank that failed, and its error."""
    rank, (cause, _) = next(iter(sorted(error.failures.items())))
    return rank, cause
