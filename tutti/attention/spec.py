"""The settings of attention that are plain numbers, and that every kernel gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class AttentionSpec(NamedTuple):
    """The rule for which keys a query sees within a sample.

    scale: factor for the scores. causal: only keys up to the query. window: only the last `window` keys, including the
    query's own (0: all). softcap: scores become softcap * tanh(score / softcap) (0: off).
    """

    scale: float
    causal: bool = True
    window: int = 0
    softcap: float = 0.0

    @classmethod
    def unpack(cls, numbers: list[float]) -> AttentionSpec:
        """The spec from a list of floats, which is what custom operators accept."""
        scale, causal, window, softcap = numbers
        return cls(scale, bool(causal), int(window), softcap)


class SparseSizes(NamedTuple):
    """The sizes of native sparse attention in tokens; `selected` in blocks. The defaults are the paper's."""

    block: int = 32
    stride: int = 16
    selected_block: int = 64
    selected: int = 16
    window: int = 512

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> SparseSizes:
        """The sizes in the `native_sparse` of a model's config; ValueError for what can't be."""
        unknown = sorted(set(entry) - set(cls._fields))
        wrong = [name for name, value in entry.items() if not isinstance(value, int) or value < 1]
        if unknown or wrong:
            known = ", ".join(cls._fields)
            raise ValueError(
                f"config.json: native_sparse: {', '.join(unknown or wrong)}: give positive numbers for {known}"
            )
        sizes = cls(**entry)
        if sizes.block % sizes.stride or sizes.selected_block % sizes.stride or sizes.selected < 3:
            raise ValueError(
                "config.json: native_sparse: stride has to divide block and selected_block, and selected has to be at "
                "least 3"
            )
        return sizes

    def num_compressed(self, length: int) -> int:
        """The number of whole blocks of a sample, M."""
        return max(0, (length - self.block) // self.stride + 1)

    @property
    def reach(self) -> int:
        """The length up to which the selected branch sees all of a sample."""
        return self.selected * self.selected_block
