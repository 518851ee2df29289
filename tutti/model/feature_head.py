"""Images of the assistant as features, which the model gets as inputs and learns to predict.

With model.output_encoder encoder an image in an answer goes through the image tower, as the user's images do. Its
features are normalized (layer norm without weights), so that they have one scale for any tower, and enter the row
through the tower's projector. The hidden state before each feature predicts it with a two-layer head. The loss of a
feature f and its prediction p is 1 - cos(p, f) + mean((p - f)^2). Targets are constants: no gradient flows through them
to the tower.

Shapes: N features, D their width (of all features pooled together), H the model's hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, layer_norm


class FeatureHead(nn.Module):
    """Predicts features [..., D] from hidden states [..., H]. first: the label of feature 0 of a batch, beyond all
    tokens."""

    def __init__(self, first: int, hidden_size: int, width: int) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layers(hidden)


def normalised(features: Tensor) -> Tensor:
    """Normalize features [..., D] to mean 0 and variance 1, computed in fp32."""
    return layer_norm(features.float(), features.shape[-1:]).to(features.dtype)


def feature_losses(predicted: Tensor, features: Tensor) -> Tensor:
    """The loss, fp32 [N], of each of N predictions [N, D] of normalized features."""
    predicted, features = predicted.float(), features.float()
    apart = (predicted - features).square().mean(-1)
    return 1 - cosine_similarity(predicted, features, dim=-1) + apart
