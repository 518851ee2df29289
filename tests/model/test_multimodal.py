"""Models that take images, packed, against the untouched Hugging Face class sample by sample: loss and gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM

from tests.model.gallery import FAMILIES, Picture, pack_pictures, picture, tiny
from tutti.core.batch import IGNORE
from tutti.model.attention import attention_by_part, resolve_attention
from tutti.model.border import make_placing
from tutti.train.task import Objective

CPU = torch.device("cpu")


def build_pair(family: str, attention: str = "sdpa", **text: Any) -> tuple[Any, Any]:
    config = tiny(family, **text)
    torch.manual_seed(0)
    plain = AutoModelForMultimodalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():  # so that attention is far from even, and towers' gradients from nothing
        for parameter in plain.parameters():
            parameter.mul_(3).add_(torch.randn_like(parameter) * 0.1)
    by_part = attention_by_part(config, resolve_attention(attention, CPU))
    packed = AutoModelForMultimodalLM.from_config(config, attn_implementation=by_part).eval()
    packed.load_state_dict(plain.state_dict())
    return plain, packed


def own_loss(plain: Any, pictures: list[Picture]) -> torch.Tensor:
    """The loss that the family's own class gives for each sample alone, summed over targets."""
    total = torch.zeros(())
    for item in pictures:
        ids = torch.from_numpy(item.sample.input_ids).long()[None]
        labels = torch.full_like(ids, IGNORE)
        labels[0, 1:] = torch.from_numpy(item.sample.labels[:-1]).long()
        loss = plain(input_ids=ids, labels=labels, use_cache=False, **item.inputs).loss
        total = total + loss * (labels != IGNORE).sum()
    return total


def assert_same_gradients(packed: Any, plain: Any) -> None:
    want = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        if want[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        # Keys' biases cancel out in the softmax: their gradient is rounding alone.
        scale = want[name.replace("k_proj.bias", "k_proj.weight")].abs().max().item()
        error = (parameter.grad - want[name]).abs().max().item()
        assert error <= 1e-4 * scale, f"{name} is off by {error:.2e} of {scale:.2e}"


def assert_packed_equals_own(family: str, pictures: list[Picture], attention: str = "sdpa", **text: Any) -> None:
    plain, packed = build_pair(family, attention, **text)
    batch = make_placing(packed)(pack_pictures(pictures, pad_to=160))
    out = Objective(packed)(batch)
    out.loss.backward()
    want = own_loss(plain, pictures)
    want.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert_same_gradients(packed, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_with_and_without_images_equal_the_family_s_own(family: str) -> None:
    pictures = [
        picture(family, 0, 12, 2),
        picture(family, 1, 9, 0),
        picture(family, 2, 20, 1),
        picture(family, 3, 7, 3),
    ]
    assert_packed_equals_own(family, pictures)
