"""Patch embeddings as matrix products equal the convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutti.core.modules import attached
from tutti.model.patch_embedding import multiply_patches

CASES = {
    "pictures": (nn.Conv2d(3, 8, 4, 4), (5, 3, 4, 4)),
    "frames": (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
    "a whole picture": (nn.Conv2d(3, 8, 4, 4), (2, 3, 8, 12)),
}


@pytest.mark.parametrize("name", CASES)
def test_as_a_convolution(name: str) -> None:
    theirs, shape = CASES[name]
    ours = copy.deepcopy(theirs)
    multiply_patches([nn.Sequential(ours)])
    multiply_patches([ours])  # once is enough
    assert attached(ours).wrappers == ("patches",)
    found = []
    for convolution in (theirs, ours):
        pixels = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).sin().requires_grad_()
        out = convolution(pixels)
        out.square().sum().backward()
        found.append((out, pixels.grad, *(parameter.grad for parameter in convolution.parameters())))
    for want, got in zip(*found, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_patches_take_no_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, shape = copy.deepcopy(CASES["frames"][0]), CASES["frames"][1]
    multiply_patches([convolution])
    monkeypatch.setattr(nn.functional, "conv3d", None)
    assert convolution(torch.ones(shape)).shape == (5, 8, 1, 1, 1)


@pytest.mark.parametrize(
    "convolution",
    [nn.Conv2d(4, 8, 4, 2), nn.Conv2d(4, 8, 4, 4, padding=1), nn.Conv2d(4, 8, 4, 4, groups=2), nn.Conv1d(4, 8, 4, 4)],
)
def test_others_stay_what_they_are(convolution: nn.Module) -> None:
    multiply_patches([convolution])
    assert attached(convolution).wrappers == ()
