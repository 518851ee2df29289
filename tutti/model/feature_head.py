"""Pictures of the assistant's as features: what a model that says them is given in their place, and predicts.

With model.output_encoder encoder a picture in an answer goes through the tower of images, as those of the user do. Its
features are normalised (layer norm without weights), so that they have one scale whatever the tower, and enter the row
by the tower's projector. The hidden state before each of them predicts it, by a head of two layers, and the loss of a
feature f and its prediction p is 1 - cos(p, f) + mean((p - f)^2). Targets are taken as they are: no gradient goes
through them to the tower.

Shapes: N features, D their width (of all that are pooled together), H the model's hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm


class FeatureHead(nn.Module):
    """Predicts features [..., D] from hidden states [..., H]. first: what the label of feature 0 of a batch is, beyond
    all tokens."""

    def __init__(self, first: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


def normalised(features: Tensor) -> Tensor:
    """Features [..., D] of mean 0 and variance 1 each, computed in fp32."""
    return layer_norm(features.float(), features.shape[-1:]).to(features.dtype)


def feature_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """The loss of each of N predictions [N, D] of normalised features, fp32 [N]."""
    predicted, features = predicted.float(), features.float()
    apart = (predicted - features).square().mean(-1)
    return 1 - cosine_similarity(predicted, features, dim=-1) + apart
