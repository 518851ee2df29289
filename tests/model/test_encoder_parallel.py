"""Images that ranks encode for each other: features and gradients equal those of encoding all on each rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForMultimodalLM

from tests.harness import run_ranks
from tests.model.gallery import FAMILIES, pack_pictures, picture, tiny
from tutti.core.batch import SequenceRanks
from tutti.core.collectives import RankGroup
from tutti.model.encoder_parallel import EncoderRanks, encode_own_share, encoder_ranks, shares
from tutti.model.structure import decoder, towers


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [[4], [4, 4], [1, 1, 1, 1, 1, 1], [16, 1, 1, 1, 1], [1, 1, 1, 1, 16], [3, 9, 2, 7]])
def test_every_image_is_of_one_rank_and_shares_are_even(lengths: list[int], size: int) -> None:
    parts = shares(lengths, size)
    assert len(parts) == size and parts[0][0] == 0 and parts[-1][1] == len(lengths)
    assert all(last == first for (_, last), (first, _) in pairwise(parts))
    even = sum(lengths) / size
    assert all(sum(lengths[first:last]) <= even + max(lengths) for first, last in parts)


def test_ranks_are_counted_from_the_innermost_group() -> None:
    ranks = SequenceRanks(1, 2, "context", 0, 3, "ulysses", tensor_size=2)
    found = encoder_ranks(ranks, RankGroup(1, 2, "tensor"))
    assert found == EncoderRanks(("tensor", "ulysses", "context"), 12, 1 + 2 * 0 + 6 * 1)
    assert encoder_ranks(ranks._replace(context_size=1, context_rank=0), None) == EncoderRanks(("ulysses",), 3, 0)


def compare_all() -> None:
    for family in FAMILIES:
        if family != "mistral3":  # which is given sizes beside images
            compare(family, [2, 0, 3])
    compare("ovis2", [2, 0, 3])  # which has outputs that are no image's
    compare("llava", [1])  # a rank without an image of its own
    compare("qwen2_vl", [2, 1], video=True)


def compare(family: str, images: list[int], *, video: bool = False) -> None:
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(tiny(family))
    inner: Any = decoder(model)
    pictures = [picture(family, seed, 9 + 9 * seed, count, video=video) for seed, count in enumerate(images)]
    extras = dict(pack_pictures(pictures).extras)
    kind, values = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
    inputs = {values: extras[values]} | {key: item for key, item in extras.items() if key.endswith("_grid_thw")}
    want = _rows(getattr(inner, f"get_{kind}_features")(**inputs, return_dict=True))
    _weighted(want).backward()
    named = [(name, p) for tower in towers(model) for name, p in tower.named_parameters()]
    want_grads = [p.grad for _, p in named]
    model.zero_grad()
    seen = []
    towers(model)[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or (kwargs["pixel_values"],))[0].numel()), with_kwargs=True
    )
    group = EncoderRanks((dist.group.WORLD.group_name,), dist.get_world_size(), dist.get_rank())
    out = encode_own_share(inner, extras, group)
    assert values not in out and out.keys() - {"mm_encoder_outputs"} == extras.keys() - {values}
    got = _rows(out["mm_encoder_outputs"][kind])
    assert sum(seen) < extras[values].numel() or sum(images) == 1, f"{family}: a rank has encoded all images"
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda text: f"{family}: {text}")
    # Each rank has a part of the tokens, and so a part of the loss.
    (_weighted(got) * (0.25 if dist.get_rank() == 0 else 0.75)).backward()
    for (name, parameter), wanted in zip(named, want_grads, strict=True):
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad)
        if wanted is not None:
            scale = max(wanted.abs().max().item(), 1e-2)
            assert (grad - wanted).abs().max() <= 1e-4 * scale, f"{family}: gradient of {name}"


def _rows(out: Any) -> list[torch.Tensor]:
    """All features that come out, each kind of them as one tensor."""
    kinds = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    if (fixed := getattr(out, "visual_indicator_features", None)) is not None:
        kinds.append(fixed)
    return [torch.cat(list(item)) if isinstance(item, (list, tuple)) else item for item in kinds]


def _weighted(features: list[torch.Tensor]) -> torch.Tensor:
    return sum((item * torch.linspace(-1, 2, item.numel()).view_as(item)).sum() for item in features)  # type: ignore


def test_two_ranks_encode_for_each_other() -> None:
    run_ranks(2, compare_all)


def test_what_takes_more_than_images_is_encoded_whole() -> None:
    model = AutoModelForMultimodalLM.from_config(tiny("idefics3"))
    extras = dict(pack_pictures([picture("idefics3", 0, 9, 2)]).extras)
    masked = extras | {"pixel_attention_mask": torch.ones(1, 2, 16, 16, dtype=torch.bool)}
    blank = {"pixel_values": torch.zeros_like(extras["pixel_values"])}
    for inputs in (masked, blank, {}):
        assert encode_own_share(decoder(model), inputs, EncoderRanks(("",), 2, 0)) == inputs
    model = AutoModelForMultimodalLM.from_config(tiny("mistral3"))
    sized = dict(pack_pictures([picture("mistral3", 0, 9, 2)]).extras)
    assert encode_own_share(decoder(model), sized, EncoderRanks(("",), 2, 0)) == sized
