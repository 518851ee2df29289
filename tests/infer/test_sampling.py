"""Each sampling argument has its documented effect."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.infer.models import infer_config
from tutti.infer.sampling import Sampler

LOGITS = torch.log(torch.tensor([[0.05, 0.5, 0.15, 0.3]]))
DRAWS = 4000


def sampler(**infer):
    return Sampler.of(infer_config("x", **infer).infer)


def shares(chosen: Sampler) -> list[float]:
    generators = [chosen.generator(number) for number in range(DRAWS)]
    counts = Counter(chosen.pick(LOGITS.expand(DRAWS, -1), generators).tolist())
    return [counts[token] / DRAWS for token in range(4)]


def test_sampling_follows_the_probabilities():
    assert shares(sampler()) == pytest.approx([0.05, 0.5, 0.15, 0.3], abs=0.03)


def test_greedy_and_the_limits_of_sampling_take_the_most_likely():
    for chosen in (sampler(do_sample=False), sampler(temperature=0.0), sampler(top_p=0.0), sampler(top_p=0.49)):
        assert shares(chosen) == [0, 1, 0, 0]


def test_temperature_sharpens_and_flattens():
    cold, hot = shares(sampler(temperature=0.5)), shares(sampler(temperature=5.0))
    squares = torch.tensor([0.05, 0.5, 0.15, 0.3]) ** 2
    assert cold == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)
    assert max(hot) - min(hot) < 0.2


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert shares(sampler(top_p=0.7)) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(sampler(top_p=0.9)) == pytest.approx([0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95], abs=0.03)


def test_the_kept_set_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 3
    for top_p in (0.1, 0.5, 0.9, 0.99):
        kept = TopPLogitsWarper(top_p)(None, logits.clone()).isfinite()
        chosen = sampler(top_p=top_p)
        for number in range(200):
            tokens = chosen.pick(logits, [chosen.generator(number * 8 + row) for row in range(8)])
            assert kept.gather(1, tokens[:, None]).all(), top_p


def test_top_k_keeps_the_most_likely():
    assert shares(sampler(top_k=1)) == [0, 1, 0, 0]
    assert shares(sampler(top_k=2)) == pytest.approx([0, 0.625, 0, 0.375], abs=0.03)
    assert shares(sampler(top_k=4)) == shares(sampler(top_k=400)) == shares(sampler())
    # As in transformers, top_p applies to what top_k leaves: the first of two tokens reaches 0.6.
    assert shares(sampler(top_k=2, top_p=0.6)) == [0, 1, 0, 0]


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    for penalty in (0.5, 1.0, 1.3):
        want = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
        got = sampler(repetition_penalty=penalty).penalize(logits, seen.tolist())
        torch.testing.assert_close(got, want)


def test_a_sequence_draws_by_its_own_seed_and_number():
    chosen = sampler(seed=3)
    logits = torch.zeros(1, 1000)
    draws = [[int(chosen.pick(logits, [random])) for _ in range(5)] for random in map(chosen.generator, (0, 0, 1))]
    assert draws[0] == draws[1] != draws[2]
    assert int(sampler(seed=4).pick(logits, [sampler(seed=4).generator(0)])) != draws[0][0]
    batch = chosen.pick(logits.expand(2, -1), [chosen.generator(1), chosen.generator(0)]).tolist()
    assert batch == [draws[2][0], draws[0][0]]


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(ValueError, match=r"infer\.model_path.*not finite"):
        sampler().pick(torch.tensor([[float("nan"), 1.0]]), [torch.Generator()])
