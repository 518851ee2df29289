"""No row lost, none repeated, none changed: from files of any kind to steps, whatever reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.fakes import build, configure, fake_encoder, ids, record
from tests.properties import examples
from tutti.data import index

__all__ = ["fake_encoder"]  # a fixture that every test here uses


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        schema = pa.schema([("id", pa.int64()), ("n", pa.int64()), ("bad", pa.string())])
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=7)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


FILES = st.lists(
    st.tuples(st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]), st.lists(st.integers(0, 40), min_size=1)),
    min_size=1,
    max_size=3,
)
"""Files by extension and the lengths of their rows; a length under 2 makes a bad row."""


@pytest.mark.parametrize("streamed", [False, True])
@examples(40)
@given(
    files=FILES,
    split=st.booleans(),
    dynamic=st.booleans(),
    buffer=st.integers(1, 20),
    layout=st.tuples(st.sampled_from([0, 0, 0, 2]), st.sampled_from([1, 2, 4])),
    keep=st.booleans(),
)
def test_every_row_is_trained_on_once_or_counted(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    streamed: bool,
    files: list[tuple[str, list[int]]],
    split: bool,
    dynamic: bool,
    buffer: int,
    layout: tuple[int, int],
    keep: bool,
) -> None:
    workers, ranks = layout
    folder = tmp_path_factory.mktemp("files")
    number, good, total = 0, [], 0
    for place, (kind, lengths) in enumerate(files):
        rows = []
        for length in lengths:
            rows.append({"id": number, "n": length} if length > 1 else {"bad": "too short"})
            good += [number] * (length > 1)
            number, total = number + 1, total + 1
        write(folder / f"{place}{kind}", rows)
    if not good:
        return
    path = str(folder)
    if split:
        path = str(folder / "sources.yaml")
        Path(path).write_text(json.dumps({"sources": [f"{place}{kind}" for place, (kind, _) in enumerate(files)]}))
    data = {"silent_exception": True, "drop_last": False, "shuffle_buffer_size": buffer, "num_workers": workers}
    train = {"micro_batch_size": 1, "global_batch_size": 4, "dyn_bsz": dynamic}
    if streamed:
        # So many samples are a whole pass and the part of a step that fills it up.
        data |= {"datasets_type": "iterable", "train_sample": len(good)}
        train["dyn_bsz"] = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTTI_CACHE", str(folder / ".cache"))
        patch.setattr(index, "KEEP_TOKENS", 32_000_000 if keep else 0)
        whole = build(configure(path, data=data, **train))
        batches = list(whole.train())
        expected = record(batches)
        parts = [record(build(configure(path, data=data, **train), rank, ranks).train()) for rank in range(ranks)]
    found = ids(batches)
    assert sorted(found[: len(good)]) == good and (streamed or len(found) == len(good))
    if not streamed or total <= index.CHUNK:  # else a stream may not have read the bad rows at its end yet
        assert whole.report.rows == total
        assert sum(whole.report.dropped.values()) == total - len(good)
    for step, (*same, micro_batches) in enumerate(expected):
        assert all(list(part[step][:4]) == same for part in parts)
        assert [parts[k % ranks][step][4][k // ranks] for k in range(4)] == micro_batches
