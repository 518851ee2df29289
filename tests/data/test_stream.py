"""Streams: skipped rows are counted once; sources without rows and unreadable files are errors."""

import gzip
import json

import pytest

from tests.data.fakes import STREAMED, build, configure, fake_encoder, make_rows, sources_yaml, write

__all__ = ["fake_encoder"]  # a fixture that every test here uses


@pytest.mark.parametrize("streamed", [False, True])
def test_a_weighted_source_without_a_usable_row(tmp_path, streamed):
    path = sources_yaml(tmp_path, weights=[1, 3])
    write(tmp_path / "few.jsonl", [{"bad": "no good"}] * 3)
    data = (STREAMED if streamed else {}) | {"silent_exception": True}
    with pytest.raises(ValueError, match=r"data\.train_path: source few has a weight but no usable row"):
        list(build(configure(path, data=data)).train())


def test_rows_that_a_stream_leaves_out_are_counted_once_logged_and_kept_in_its_state(tmp_path, caplog):
    rows = make_rows(300)
    for number in range(0, 300, 20):
        rows[number] = {"bad": "no good"}
    path = sources_yaml(tmp_path)
    write(tmp_path / "many.jsonl", rows)
    data = STREAMED | {"train_sample": 400, "silent_exception": True, "num_workers": 2}
    config = configure(path, data=data, num_train_epochs=2, micro_batch_size=5)
    running, states = build(config), []
    with caplog.at_level("INFO", "tutti"):
        states += [(running.state_dict(), running.report) for _ in running.train()]
        running.close()
    first, last = states[0][1], states[-1][1]
    assert 0 < first.rows < last.rows == 320 and last.dropped == {"no good": 15}
    for count in ("1 row", "10 rows"):
        assert caplog.text.count(f"left out {count} so far") == 1
    assert caplog.text.count("data.train_path: left out 15 of 320 rows: no good") == 1
    for step in (3, 40, 100):
        state, report = states[step]
        resumed = build(config)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        assert resumed.report == report
        list(resumed.train())
        assert resumed.report == last


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_in_a_stream_is_one_line(tmp_path, workers):
    data = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in make_rows(2000)).encode()))
    del data[len(data) // 2 :]
    (tmp_path / "a.jsonl.gz").write_bytes(data)
    config = configure(str(tmp_path / "a.jsonl.gz"), data=STREAMED | {"train_sample": 2000, "num_workers": workers})
    with pytest.raises(ValueError, match=r"^\S+/a\.jsonl\.gz can't be decompressed: [^\n]*$"):
        list(build(config).train())
