"""User-defined datasets: a factory of rows, or of encoded samples."""

import numpy as np
import pytest

from tests.data.fakes import L, build, configure, fake_encoder, ids, sample
from tutti.core.batch import IGNORE, Sample

__all__ = ["fake_encoder"]  # a fixture that every test here uses


def custom(path):
    return [{"id": number, "n": 5} for number in range(int(path))]


def custom_stream(path):
    class Rows:
        def __iter__(self):
            yield from custom(path)

    return Rows()


@pytest.mark.parametrize("factory, steps", [("custom", 12), ("custom_stream", 30)])
def test_a_dataset_of_the_users_own(factory, steps):
    data = {"datasets_type": f"{__name__}:{factory}", "train_sample": 30, "eval_path": "7"}
    built = build(configure("12", data=data))
    assert built.total_steps == steps
    assert set(ids(built.train())) == set(range(12))
    assert ids(built.evaluate()) == list(range(7))


def custom_samples(path):
    return [sample(number, 5, 0) for number in range(int(path))]


def custom_bad_samples(path):
    good = sample(1, 5, 0)
    return [
        good,
        sample(2, L + 1, 0),
        sample(10**6, 4, 0),
        Sample(good.input_ids, good.labels[1:]),
        Sample(good.input_ids, np.full(5, IGNORE, np.int32)),
        "text",
    ]


def test_a_dataset_of_ready_made_samples():
    built = build(configure("12", data={"datasets_type": f"{__name__}:custom_samples"}))
    assert built.report.trained_tokens == 12 * 4
    assert sorted(ids(built.train())) == list(range(12))
    data = {"datasets_type": f"{__name__}:custom_bad_samples", "silent_exception": True}
    reasons = build(configure("12", data=data)).report.dropped
    for reason, words in zip(
        reasons,
        ["longer than data.max_seq_len", "vocabulary", "equally long", "no trained", "named columns"],
        strict=True,
    ):
        assert words in reason
