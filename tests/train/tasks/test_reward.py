"""Reward models: loss and gradients equal the formula on the original class on any layout, and training works."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from tests.model.zoo import tiny
from tests.train.runs import run, tiny_config, write_pairs
from tests.train.test_objective import assert_same_gradients, build_pair
from tests.train.test_run import STEP_KEYS, assert_same_training
from tutti.core.batch import IGNORE, Sample, pack
from tutti.train.objective import Objective
from tutti.train.tasks.reward import RewardModelling


def make_pairs(vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(3)
    samples = []
    for number, lengths in enumerate(((9, 14), (21, 8), (5, 5))):
        ids = [rng.integers(3, vocabulary, n).astype(np.int32) for n in lengths]
        labels = [np.append(np.full(n - 1, IGNORE, np.int32), np.int32(0)) for n in lengths]
        samples.append(Sample(np.concatenate(ids), np.concatenate(labels), number % 2, split=lengths[0]))
    return samples


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_loss_and_gradients_equal_the_formula(family: str) -> None:
    config = tiny(family)
    config.num_labels, config.pad_token_id = 1, 0
    plain, packed = build_pair(AutoModelForSequenceClassification, config)
    samples = make_pairs(config.vocab_size)
    sums = Objective(packed, RewardModelling(num_sources=2))(pack(samples, pad_to=80))
    sums["loss"].backward()
    margins = []
    for sample in samples:
        sides = np.split(sample.input_ids, [sample.split])
        chosen, rejected = (plain(input_ids=torch.from_numpy(ids).long()[None]).logits[0, 0] for ids in sides)
        margins.append(chosen - rejected)
    losses = -logsigmoid(torch.stack(margins))
    losses.sum().backward()
    assert sums["loss"].item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert sums["margin"].item() == pytest.approx(sum(margin.item() for margin in margins), rel=1e-4)
    assert sums["correct"] == sum(margin > 0 for margin in margins)
    torch.testing.assert_close(sums["source_loss"], torch.stack([losses[0] + losses[2], losses[1]]).detach())
    assert_same_gradients(packed, plain)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Quickstart's answers, preferred to their words in reverse."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 48, 300)


def reward_config(folder: Path, rows: str, *, world: int = 1, **changes: object):
    values = {
        "data.data_type": "reward", "data.train_path": rows, "data.max_seq_len": 256, "train.max_steps": 3,
        "train.lr": 1e-3, "train.lr_decay_style": "constant",
    }  # fmt: skip
    return tiny_config(folder, world=world, **values | changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, rows: str) -> list[dict]:
    return run(reward_config(tmp_path_factory.mktemp("reference"), rows))


def test_metrics_begin_at_an_even_chance(reference: list[dict]) -> None:
    for line in reference:
        assert set(line) == STEP_KEYS | {"accuracy", "margin"}
    assert reference[0]["loss"] == pytest.approx(0.6931, abs=0.05)


@pytest.mark.parametrize(
    "layout",
    [{}, {"ulysses_parallel_size": 2}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=lambda layout: next(iter(layout), "data"),
)
def test_layouts_equal_one_process(tmp_path: Path, rows: str, reference: list[dict], layout: dict) -> None:
    sizes = {f"train.{name}": size for name, size in layout.items()}
    assert_same_training(run(reward_config(tmp_path, rows, world=2, **sizes), 2), reference)


def test_what_is_learnt_is_exported_as_a_sequence_classifier(tmp_path: Path, rows: str) -> None:
    settings = {
        "train.num_train_epochs": 8, "train.max_steps": 6, "train.save_hf_weights": True, "data.eval_path": rows,
        "train.eval_epochs": 8,
    }  # fmt: skip
    lines = run(reward_config(tmp_path, rows, **settings))
    *_, evaluation = (line for line in lines if "eval_loss" in line)
    assert evaluation["eval_accuracy"] > 0.9 and evaluation["eval_loss"] < 0.4
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "hf" / "final")
    assert model.config.num_labels == 1 and model.score.weight.shape[0] == 1
