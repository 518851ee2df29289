"""Rows `{"id", "n", "pieces"?}`, a test encoder that turns each into a sample of n tokens, all equal to the id, so that
batches show which samples they contain, and configurations for such data. A row with `bad` cannot be used.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tutti.config import Config
from tutti.core.batch import IGNORE, Sample
from tutti.core.dist import World
from tutti.data import loader
from tutti.data.loader import build_data
from tutti.data.source import BadRow

L = 64
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


def encode(rows, source):
    results = []
    for row in rows:
        if isinstance(row, BadRow):
            results.append(row)
        elif "bad" in row.value:
            results.append(BadRow(row.file, row.line, row.value["bad"]))
        else:
            value = row.value
            results.append([sample(value["id"] + piece, value["n"], source) for piece in range(value.get("pieces", 1))])
    return results


def sample(number, length, source):
    labels = np.full(length, number, np.int32)
    labels[-1] = IGNORE
    return Sample(np.full(length, number, np.int32), labels, source)


def make_rows(count, *, first=0, seed=0):
    lengths = np.clip(np.random.default_rng(seed).lognormal(2.8, 0.6, count), 2, L).astype(int)
    return [{"id": first + number, "n": int(length)} for number, length in enumerate(lengths)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch):
    use_fake_encoder(monkeypatch.setattr)


def use_fake_encoder(setattr_):
    setattr_(loader, "make_encoder", lambda *args, **kwargs: encode)


DATA = {"max_seq_len": L, "num_workers": 0, "dyn_bsz_buffer_size": 20, "shuffle_buffer_size": 16}


def configure(path, explicit=(), data=None, **train):
    base = Config(explicit=frozenset(explicit))
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, **{"train_path": path, **DATA, **(data or {})}),
        train=dataclasses.replace(base.train, **train),
    )


def build(config, dp_rank=0, dp_size=1, dist=ALONE):
    return build_data(config, None, world=dist, dp_rank=dp_rank, dp_size=dp_size, vocab_size=10**6)


def samples_of(batch):
    """The ids of a micro batch's samples, in order."""
    starts = batch.cu_seqlens[:-1][batch.segment_sources >= 0]
    return batch.input_ids[starts.long()].tolist()


def facts(batch):
    return batch.num_targets, batch.num_tokens, batch.num_samples, batch.num_slots, dict(batch.source_tokens)


def record(batches):
    """All contents of global batches that a trainer can observe."""
    return [
        (batch.step, batch.epoch, batch.epoch_end, facts(batch), [samples_of(one) for one in batch.micro_batches])
        for batch in batches
    ]


def ids(batches):
    return [one for *_, micro_batches in record(batches) for micro_batch in micro_batches for one in micro_batch]


STREAMED = {"datasets_type": "iterable", "train_size": 2_000, "train_sample": 100}
KINDS = {
    "fixed": ({}, {"micro_batch_size": 2, "global_batch_size": 8}),
    "packed": ({}, {"micro_batch_size": 2, "global_batch_size": 8, "dyn_bsz": True}),
    "streamed": (STREAMED, {"micro_batch_size": 2, "global_batch_size": 8}),
    "streamed packed": (STREAMED, {"micro_batch_size": 2, "global_batch_size": 8, "dyn_bsz": True}),
}


def sources_yaml(folder, weights=None, names=("few", "many")):
    write(folder / "few.jsonl", make_rows(20))
    write(folder / "many.jsonl", make_rows(50, first=1000, seed=1))
    spec = {"sources": ["few.jsonl", "many.jsonl"], "names": list(names)}
    if isinstance(weights, dict):
        spec |= weights
    elif weights:
        spec["weights"] = weights
    (folder / "mix.yaml").write_text(json.dumps(spec))
    return str(folder / "mix.yaml")
