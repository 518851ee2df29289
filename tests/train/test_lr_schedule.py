import pytest

from tutti.config import TrainConfig
from tutti.train.lr_schedule import learning_rate


def rates(total: int, **settings) -> list[float]:
    train = TrainConfig(**{"lr": 1.0, "lr_min": 0.1, "lr_start": 0.0, **settings})
    return [learning_rate(step, total, train) for step in range(total)]


@pytest.mark.parametrize(
    ("total", "settings", "expected"),
    [
        (4, {"lr_decay_style": "constant"}, [1, 1, 1, 1]),
        (4, {"lr_decay_style": "constant", "lr_warmup_ratio": 0.5, "lr_start": 0.2}, [0.2, 0.6, 1, 1]),
        (5, {"lr_decay_style": "linear", "lr_decay_ratio": 0.6}, [1, 0.7, 0.4, 0.1, 0.1]),
        (6, {"lr_decay_style": "linear", "lr_warmup_ratio": 0.34, "lr_decay_ratio": 0.84}, [0, 0.5, 1, 0.7, 0.4, 0.1]),
        (4, {"lr_decay_style": "cosine"}, [1, 0.55 + 0.45 * 0.5**0.5, 0.55, 0.55 - 0.45 * 0.5**0.5]),
        (6, {"lr_decay_style": "cosine", "lr_warmup_ratio": 0.34}, [0, 0.5, 1, 0.55 + 0.45 * 0.5**0.5, 0.55, None]),
    ],
    ids=["constant", "warmup", "linear", "warmup-linear", "cosine", "warmup-cosine"],
)
def test_values(total, settings, expected):
    for step, (rate, wanted) in enumerate(zip(rates(total, **settings), expected, strict=True)):
        assert wanted is None or rate == pytest.approx(wanted, abs=1e-12), f"step {step}"


def test_the_default_is_cosine_over_the_whole_run_without_warmup():
    train = TrainConfig()
    assert learning_rate(0, 100, train) == train.lr
    assert learning_rate(50, 100, train) == pytest.approx((train.lr + train.lr_min) / 2)
    assert learning_rate(100, 100, train) == train.lr_min


def test_flat_after_the_decay_and_past_the_end():
    train = TrainConfig(lr=1.0, lr_min=0.1, lr_decay_ratio=0.5)
    assert [learning_rate(step, 10, train) for step in (5, 9, 10, 99)] == [0.1] * 4


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_decay_that_ends_inside_the_warmup(style):
    shape = {"lr_decay_style": style, "lr_warmup_ratio": 0.5}
    assert rates(4, **shape, lr_decay_ratio=0.25) == [0, 0.5, 0.1, 0.1]
    assert rates(4, **shape, lr_decay_ratio=0.5) == [0, 0.5, 0.1, 0.1]


def test_one_step():
    assert rates(1) == [1.0]
    assert rates(1, lr_warmup_ratio=0.9) == [1.0]
    assert rates(1, lr_warmup_ratio=1.0, lr_start=0.3) == [0.3]


def test_a_warmup_of_the_whole_run():
    assert rates(4, lr_warmup_ratio=1.0) == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_peak_below_the_default_of_the_least_rate_is_kept(style: str) -> None:
    assert set(rates(10, lr=1e-8, lr_min=1e-7, lr_decay_style=style, lr_decay_ratio=0.5)) == {1e-8}
