"""The part of attention that is plain numbers, and that every kernel is given."""

from __future__ import annotations

from typing import NamedTuple


class AttentionSpec(NamedTuple):
    """The rule by which queries see keys within a sample.

    scale: factor on the scores. causal: only keys up to the query. window: the last `window` keys, the query's own
    included (0 = all). softcap: scores become softcap * tanh(score / softcap) (0 = off).
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @classmethod
    def unpack(cls, numbers: list[float]) -> AttentionSpec:
        """The spec from a list of them as floats, which is what custom operators can be given."""
        scale, causal, window, softcap = numbers
        return cls(scale, bool(causal), int(window), softcap)
