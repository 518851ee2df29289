"""Choose the next token from logits, so that a text depends on its own seed and nothing else.

Every sequence has its own random generator, seeded by `infer.seed` and the sequence's number. For each token one
uniform number is drawn and looked up in the cumulative distribution: neither the batch that a sequence is in nor the
order in which sequences finish changes the result.

Shapes: B sequences, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tutti.config import InferConfig
from tutti.core.tensors import seed_of


@dataclass(frozen=True)
class Sampler:
    """Chooses tokens. greedy: always the most likely one. The other fields as in `infer.*`."""

    greedy: bool
    temperature: float
    top_p: float
    seed: int
    top_k: int = 0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: InferConfig) -> Sampler:
        """The configured sampler; a temperature of 0 is greedy."""
        greedy = not config.do_sample or config.temperature == 0
        limits = config.temperature, config.top_p, config.seed, config.top_k
        return cls(greedy, *limits, repetition_penalty=config.repetition_penalty)

    def generator(self, number: int) -> torch.Generator:
        """The random generator of sequence `number`."""
        return torch.Generator().manual_seed(seed_of(f"{self.seed} {number}"))

    def penalize(self, logits: Tensor, seen: Sequence[Sequence[int]]) -> Tensor:
        """The logits [B, V], reduced for tokens that each sequence has already `seen` (arXiv 1909.05858)."""
        factor = torch.ones_like(logits, dtype=torch.float32)
        for row, tokens in enumerate(seen):
            factor[row, torch.tensor(sorted(set(tokens)), dtype=torch.long, device=logits.device)] = (
                self.repetition_penalty
            )
        return torch.where(logits > 0, logits / factor, logits * factor)

    def pick(self, logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each sequence, [B], from logits [B, V]. ValueError: they are not finite."""
        if self.greedy:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        if not bool(probabilities[:, 0].isfinite().all()):
            raise ValueError("infer.model_path: the model's logits are not finite")
        if 0 < self.top_k < logits.shape[-1]:
            least = probabilities.topk(self.top_k, dim=-1).values[:, -1:]
            probabilities = probabilities.masked_fill(probabilities < least, 0.0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        if self.top_p < 1:
            probabilities = probabilities.masked_fill(self._outside(probabilities), 0.0)
        # In the vocabulary's order: among sorted tokens, rounding could swap neighbors and change the result.
        sums = probabilities.cumsum(-1, dtype=torch.float64)
        draws = torch.stack([torch.rand(1, generator=item, dtype=torch.float64) for item in generators])
        places = torch.searchsorted(sums, draws.to(sums.device) * sums[:, -1:], right=True)
        # Rounding may put the number at the very end, after the last token with nonzero probability.
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
        return places.minimum(last)[:, 0]

    def _outside(self, probabilities: Tensor) -> Tensor:
        """Mask of the tokens [B, V] outside of the smallest set that reaches top_p; the most likely token is always
        inside."""
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= self.top_p
        outside[:, 0] = False
        return outside.scatter(-1, order, outside)
