"""Reading ahead: the bytes that are copied next, and no more of them than there is room for."""

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoint.weighing import ONE, on_meta
from tutti.checkpoint import read_ahead
from tutti.checkpoint.hf_files import Checkpoint
from tutti.checkpoint.hf_load import load_weights
from tutti.checkpoint.read_ahead import ReadAhead, Span


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The begin and size of every piece that is read ahead."""
    found: list[tuple[int, int]] = []
    read = os.preadv

    def preadv(descriptor: int, buffers: list[Any], begin: int) -> int:
        found.append((begin, len(buffers[0])))
        return read(descriptor, buffers, begin)

    monkeypatch.setattr(os, "preadv", preadv)
    return found


def test_spans_are_the_bytes_of_tensors_and_of_their_rows(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.arange(5, dtype=torch.int64), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    for key, rows in (("a", None), ("a", slice(1, 3)), ("b", slice(0, 5)), ("c", None)):
        span = checkpoint.span(key, rows)
        assert span is not None
        wanted = tensors[key] if rows is None else tensors[key][rows]
        assert data[span.begin : span.end] == wanted.numpy().tobytes()


def test_no_more_is_read_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(read_ahead, "AHEAD_BYTES", 100)
    monkeypatch.setattr(read_ahead, "PIECE_BYTES", 40)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    spans = [Span(file, 10, 100), Span(file, 500, 560), Span(file, 900, 910)]
    with ReadAhead(spans) as ahead:
        while len(reads) < 3:
            pass
        ahead.used(spans[0])
        while len(reads) < 6:
            pass
        assert reads == [(10, 40), (50, 40), (90, 10), (500, 40), (540, 20), (900, 10)]
    assert ahead not in threading.enumerate() and not ahead._thread.is_alive()
    with ReadAhead([Span(file, 0, 1000)]) as ahead:
        pass
    assert not ahead._thread.is_alive(), "it ends although there is no room for the rest"
    with ReadAhead([Span(tmp_path / "gone", 0, 10), spans[0]]):
        pass


def test_loading_reads_each_tensor_ahead_once(folders: Path, reads: list[tuple[int, int]]) -> None:
    load_weights(on_meta("llama"), folders / "llama", world=ONE)
    checkpoint = Checkpoint(folders / "llama")
    sizes = {key: (span.begin, span.end - span.begin) for key in checkpoint.meta() if (span := checkpoint.span(key))}
    assert set(reads) <= set(sizes.values()) and len(set(reads)) == len(reads)
