"""Random draws by key, and the things on which they do not depend."""

import torch

from tutti.core.keyed_random import generator


def draw(*key: object) -> list[float]:
    return torch.rand(4, generator=generator(*key)).tolist()  # type: ignore[arg-type]


def test_a_key_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    first = draw(7, 0, "sample 3", "noise")
    torch.rand(5), draw(7, 1, "sample 3", "noise")
    assert draw(7, 0, "sample 3", "noise") == first


def test_every_element_of_a_key_counts() -> None:
    keys = [(7, 0, 3, "noise"), (8, 0, 3, "noise"), (7, 1, 3, "noise"), (7, 0, 4, "noise"), (7, 0, 3, "time")]
    keys += [(7, 0, "3", "noise"), (7, 0, (3, "noise")), (7, 3, 0, "noise")]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_numbers_stay_the_same_between_releases() -> None:
    """A resumed run draws the same as if it had not stopped."""
    assert generator(0, 1, "a").initial_seed() == 7896178022882239558
