"""Patch embeddings as a matrix product instead of a convolution.

Encoders whose processors cut images into patches (Qwen2-VL and similar) embed them with a convolution whose kernel is
as large as its input: each patch is one vector times one matrix. Convolution kernels take three times as long for this
on CPUs, and longer still in half precision on accelerators.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps

from torch import Tensor, nn

from tutti.core.modules import Forward, attached, wrap_forward

NAME = "patches"


def multiply_patches(towers: Iterable[nn.Module]) -> None:
    """Make the convolutions in `towers` whose stride equals their kernel size use a matrix product."""
    for module in (part for tower in towers for part in tower.modules()):
        if not isinstance(module, nn.Conv2d | nn.Conv3d) or NAME in attached(module).wrappers:
            continue
        plain = module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}
        if plain and module.stride == module.kernel_size:
            wrap_forward(module, NAME, partial(_as_product, convolution=module))


def _as_product(forward: Forward, convolution: nn.Conv2d | nn.Conv3d) -> Forward:
    """The forward of such a convolution, from [N, C, *sizes] to [N, D, *number of patches along each]."""

    @wraps(forward)
    def run(patches: Tensor) -> Tensor:
        if patches.shape[2:] != convolution.kernel_size:
            return forward(patches)
        rows = nn.functional.linear(patches.flatten(1), convolution.weight.flatten(1), convolution.bias)
        return rows.view(*rows.shape, *(1 for _ in convolution.kernel_size))

    return run
