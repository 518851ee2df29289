"""Counted nouns: one of a thing is singular."""

from tutti.config.nouns import counted


def test_only_one_is_singular() -> None:
    assert [counted(count, "step") for count in (0, 1, 2, 1200)] == ["0 steps", "1 step", "2 steps", "1,200 steps"]
    assert counted(1, "process", "processes") == "1 process" and counted(3, "process", "processes") == "3 processes"
