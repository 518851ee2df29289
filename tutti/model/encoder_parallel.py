"""Distributed encoding of images: each image of a batch that ranks share is encoded by one of them.

Ranks that divide a batch's tokens, or a model's matrices, all get its images. On each of them a large tower would
repeat work that costs as much as their share of the text. So each rank encodes its share of the images, and the
features are gathered, before the outer decoder runs; it takes them as `mm_encoder_outputs`:

1. Images are assigned to ranks in order, in shares that are as even as their numbers of values allow.
2. A rank runs the family's own `get_image_features` (or of videos) on its share. If there are fewer images than ranks,
   a rank without a share still runs it on one image to learn the shapes of its outputs, and contributes no rows.
3. Features are rows, and an image's size determines their number. They are padded to equal lengths, gathered, and cut
   into images again, in the form that the family's method returns.

In the backward pass the gradients that all ranks have for an image's features are summed and sent to the rank that
encoded it. So the sum over all ranks of a tower's gradient is what it would be if each had encoded everything.

Families that need more than an image and its size for this (masks, tiles) encode all images on every rank.

Shapes: N images, R rows of features, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tutti.core.batch import SequenceRanks
from tutti.core.collectives import RankGroup, gather_over

_KINDS = (
    ("image", "pixel_values", "image_grid_thw"),
    ("video", "pixel_values_videos", "video_grid_thw"),
    ("drawn", "drawn_values", "drawn_grid_thw"),
)
"""A kind of encoded input: its name, and the names of its values and sizes among a forward's arguments."""

_LISTS = ("deepstack_features",)
"""Additional outputs of an encoder: a list of elements in the same form."""

_FIXED = ("visual_indicator_features",)
"""Additional outputs that do not depend on images: every rank has them."""


class EncoderRanks(NamedTuple):
    """The ranks that get the same images. groups: the groups that they form, the innermost first. size: their
    number. place: this rank's index among them."""

    groups: tuple[str, ...]
    size: int
    place: int


def encoder_ranks(ranks: SequenceRanks, tensor: RankGroup | None) -> EncoderRanks:
    """The ranks that share a batch, including those of a tensor group."""
    axes = [] if tensor is None else [(tensor.group, tensor.size, tensor.rank)]
    axes.append((ranks.ulysses_group, ranks.ulysses_size, ranks.ulysses_rank))
    axes.append((ranks.context_group, ranks.context_size, ranks.context_rank))
    size, place, groups = 1, 0, []
    for group, number, rank in axes:
        if number > 1:
            groups.append(group)
            size, place = size * number, place + rank * size
    return EncoderRanks(tuple(groups), size, place)


def encode_own_share(decoder: Any, inputs: Mapping[str, Tensor], ranks: EncoderRanks) -> dict[str, Any]:
    """`inputs` of an outer decoder's forward, with images replaced by features where this is known to be exact.

    A collective call of `ranks`, forward and backward.
    """
    left: dict[str, Any] = dict(inputs)
    made: dict[str, Any] = {}
    for kind, values, sizes in _KINDS:
        if values not in inputs:
            continue
        method = getattr(decoder, f"get_{kind}_features")
        taken = set(inspect.signature(method).parameters) & set(inputs) - {values, sizes}
        images = _images(inputs[values], inputs.get(sizes))
        if taken or images is None or "mm_encoder_outputs" not in inspect.signature(decoder.forward).parameters:
            return dict(inputs)
        made[kind] = _share(method, values, sizes, images, ranks)
        del left[values]
    return left | ({"mm_encoder_outputs": made} if made else {})


class _Images(NamedTuple):
    """Images that can be separated. values: of all images, along `dim`. lengths: of each image along it. sizes: [N,
    3], if the family takes them."""

    values: Tensor
    dim: int
    lengths: list[int]
    sizes: Tensor | None

    def take(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        begin = sum(self.lengths[:first])
        own = self.values.narrow(self.dim, begin, sum(self.lengths[first:last]))
        return own, None if self.sizes is None else self.sizes[first:last]


def _images(values: Tensor, sizes: Tensor | None) -> _Images | None:
    """The patches of all images, [N, C, height, width] or [1, N, C, height, width]; None if it is
    something else."""
    if sizes is not None and values.ndim == 2:
        return _Images(values, 0, sizes.prod(-1).tolist(), sizes)
    if sizes is None and values.ndim == 4:
        return _Images(values, 0, [1] * len(values), None)
    if sizes is None and values.ndim == 5 and len(values) == 1 and bool(values.flatten(2).any(-1).all()):
        # These families skip images that are entirely zero, which then have no features.
        return _Images(values, 1, [1] * values.shape[1], None)
    return None


def shares(lengths: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The first and the last + 1 of the images, of these `lengths`, that each of `size` ranks encodes, in order."""
    total = sum(lengths)
    # An image belongs to the rank whose even share of all values contains its middle.
    owners = [
        min(size - 1, (2 * end - length) * size // (2 * total))
        for end, length in zip(accumulate(lengths), lengths, strict=True)
    ]
    return [(sum(owner < rank for owner in owners), sum(owner <= rank for owner in owners)) for rank in range(size)]


def _share(method: Any, values: str, sizes: str, images: _Images, ranks: EncoderRanks) -> Any:
    """The output of `method` for all images; this rank runs it on its share."""
    parts = shares(images.lengths, ranks.size)
    first, last = parts[ranks.place]
    own, own_sizes = images.take(first, last) if first < last else images.take(0, 1)
    arguments = {values: own} | ({} if own_sizes is None else {sizes: own_sizes})
    out = method(**arguments, return_dict=True)
    held = sum(images.lengths[first:last]) or images.lengths[0]

    def whole(features: Any) -> Any:
        by_image = isinstance(features, (list, tuple))
        rows = torch.cat(list(features)) if by_image else features
        each = [length * len(rows) // held for length in images.lengths]
        longest = max(sum(each[begin:end]) for begin, end in parts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        mine = sum(each[first:last])
        assert mine in (0, len(rows)), "rows of features that do not go by the size of their image"
        padded[:mine] = rows[:mine]
        gathered = gather_over(padded, ranks.groups).split(longest)
        joined = torch.cat([part[: sum(each[begin:end])] for part, (begin, end) in zip(gathered, parts, strict=True)])
        return joined.split(each) if by_image else joined

    lists = {name: [whole(item) for item in getattr(out, name)] for name in _LISTS if getattr(out, name, None)}
    result = BaseModelOutputWithPooling(pooler_output=whole(out.pooler_output))
    for name, items in (lists | {name: getattr(out, name) for name in _FIXED if hasattr(out, name)}).items():
        setattr(result, name, items)
    return result
