"""What a run optimizes: the model and its loss as one module, from a packed batch to sums.

`Objective` is the root that is parallelized. It calls the model's decoder for hidden states and applies the head inside
the fused loss, at the trained positions alone; logit scaling and soft-capping come along as data. Language modelling
and classification are the same computation, with the vocabulary or the classes as the head's outputs. Of pairs of
answers the log-probabilities are compared (`tutti.train.tasks.preference`), and a pair counts as one target. Sums leave
here, never means: what they are divided by is a matter of the global batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutti.attention.interface import packed_kwargs
from tutti.core.batch import Batch
from tutti.model.multimodal import MultimodalForward
from tutti.model.structure import count_flops, decoder, head, is_classifier, logit_transform, towers
from tutti.parallel.pipeline.stage import Passed, Stage, by_layer, hand_on
from tutti.parallel.sequence import gather_tokens
from tutti.parallel.tensor import TensorRanks, gather_tensor
from tutti.train.loss import VocabularyShard, linear_cross_entropy, target_losses
from tutti.train.tasks.preference import Preference, answer_sums


class Output(NamedTuple):
    """Sums over one micro batch of N targets; where ranks share its tokens, a rank's share of them.

    loss: to differentiate. losses [N]: each target's own, detached. router_loss: the auxiliary loss of a mixture of
    experts (already weighted by its coefficient) times the batch's tokens, or None. num_correct: targets that a
    classifier ranks first, or pairs whose chosen answer wins, else None. rewards [2]: of the chosen and of the rejected
    answers, and log_probs [P, 2], theirs (not a share of them), of P pairs; else None.
    """

    loss: Tensor
    losses: Tensor
    router_loss: Tensor | None
    num_correct: Tensor | None
    rewards: Tensor | None = None
    log_probs: Tensor | None = None


class Objective(nn.Module):
    """The model with its loss. `predicts`: it is a classifier, or compares answers, and is right or wrong. `flops`: of
    the whole model, also where a rank has a part of its depth.

    preference: how pairs of answers are compared, where the data is that.
    tensor: the ranks that split the model's matrices. They have the same targets, and each answers for an equal share
    of every sum.
    by_sample: apply the head to each sample's targets apart from the others' (train.enable_batch_invariant_mode).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tensor: TensorRanks | None = None,
        preference: Preference | None = None,
        *,
        by_sample: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.preference = preference
        self.predicts = is_classifier(model) or preference is not None
        self._classifies = is_classifier(model)
        self._by_sample = by_sample
        self._tensor = tensor
        self._share = 1.0 if tensor is None else 1.0 / tensor.size
        self._shard: VocabularyShard | None = None
        if tensor is not None and not self._classifies:
            self._shard = VocabularyShard(tensor.start(head(model).out_features), tensor.group, tensor.size)
        self._border = MultimodalForward(model, tensor) if towers(model) else None
        self._transform = logit_transform(model)
        self._router_loss = _router_loss(model)
        self.has_router_loss = self._router_loss is not None
        self.flops = count_flops(model)

    def forward(
        self, batch: Batch, *, only_logits: bool = False, stage: Stage | None = None, received: Passed | None = None
    ) -> Output | Tensor | Passed:
        """The sums; or `only_logits`: what the model says at the N target positions, whatever their labels, [N, V].

        stage: the part of the model's depth to run, on what was `received` from the stage before. Unless it is the
        last one, what the next is to receive is returned.
        """
        if batch.extras and self._border is None:
            name = type(self.model).__name__
            raise ValueError(f"{name} has nothing beside a language model that could take {', '.join(batch.extras)}")
        options = {} if self._router_loss is None else {"output_router_logits": True}
        if self._border is not None:
            states = self._border.run(batch, stage, received, **options)
        elif stage is None:
            states = decoder(self.model)(**packed_kwargs(batch), **options)
        else:
            states = stage.run(decoder(self.model), packed_kwargs(batch) | options, received)
        if stage is not None and not stage.is_last:
            return hand_on(states)
        if only_logits:
            return self._logits(states, batch)
        hidden = self._at_targets(states, batch)
        targets = batch.labels.index_select(0, batch.target_index)
        router_loss = None
        if self._router_loss is not None:
            # Not a sum over tokens: it takes the router's logits of a batch that ranks share as a whole.
            router_loss = self._router_loss(self._routed(states, batch)) * (batch.num_tokens * self._share)
        if batch.pairs is not None:
            return self._compare(hidden, targets, batch)._replace(router_loss=router_loss)
        pieces = self._pieces(batch)
        loss, losses = self._by_head(linear_cross_entropy, hidden, targets, pieces)
        if self._shard is None and self._tensor is not None:
            loss, losses = loss * self._share, losses * self._share
        num_correct = None
        if self._classifies:
            logits = self._transform(_project(hidden, head(self.model), pieces))
            num_correct = (logits.argmax(-1) == targets).sum() * self._share
        return Output(loss, losses, router_loss, num_correct)

    def _compare(self, hidden: Tensor, targets: Tensor, batch: Batch) -> Output:
        """Of a batch of pairs, from the hidden states [N, H] at its targets. Every rank that shares the batch compares
        whole answers, and backward sees to its own tokens; so only what is counted is a share."""
        assert self.preference is not None, "pairs need a preference"
        losses = self._by_head(target_losses, hidden, targets, self._pieces(batch))
        log_probs = -answer_sums(losses, batch)
        compared, rewards = self.preference.compare(log_probs, batch)
        share = self._share / (batch.sequence.ranks.size if batch.sequence is not None else 1)
        loss, counted = compared.sum(), compared.detach() * share
        return Output(
            loss=loss + (counted.sum() - loss.detach()),
            losses=counted,
            router_loss=None,
            num_correct=(rewards[:, 0] > rewards[:, 1]).sum() * share,
            rewards=rewards.sum(0) * share,
            log_probs=log_probs.detach(),
        )

    def _by_head(self, losses_of: Callable[..., Any], hidden: Tensor, targets: Tensor, pieces: list[int] | None) -> Any:
        """What a function of `tutti.train.loss` makes of hidden states [N, H] and their targets [N] by the head."""
        layer = head(self.model)
        return losses_of(
            hidden,
            layer.weight,
            targets,
            bias=layer.bias,
            transform=self._transform,
            shard=self._shard,
            pieces=pieces,
        )

    def _routed(self, states: Any, batch: Batch) -> tuple[Tensor, ...]:
        """The routers' logits of each layer for all of the batch's tokens [T, E]."""
        layers = by_layer(states.router_logits, states.last_hidden_state.shape[1])
        rows = (gather_tokens(self._of_all_ranks(logits, batch), batch.sequence) for logits in layers)
        return tuple(logits[: len(logits) - batch.fillers] for logits in rows)

    def _logits(self, states: Any, batch: Batch) -> Tensor:
        layer = head(self.model)
        logits = _project(self._at_targets(states, batch), layer, self._pieces(batch))
        if self._shard is not None and self._tensor is not None:
            # The last ranks may have less of the vocabulary than the others.
            share = -(-layer.out_features // self._tensor.size)
            logits = nn.functional.pad(logits, (0, share - logits.shape[-1]), value=-torch.inf)
            logits = gather_tensor(logits, self._tensor, 1)[:, : layer.out_features]
        return self._transform(logits)

    def _pieces(self, batch: Batch) -> list[int] | None:
        """How many targets each sample has, where each is to be computed apart; waits for the device."""
        if not self._by_sample:
            return None
        sample = torch.bucketize(batch.target_index, batch.cu_seqlens[1:], right=True)
        return sample.bincount(minlength=len(batch.cu_seqlens) - 1).tolist()

    def _at_targets(self, states: Any, batch: Batch) -> Tensor:
        """The last hidden states [N, H] of a decoder's output at the batch's target positions."""
        return self._of_all_ranks(states.last_hidden_state.squeeze(0), batch).index_select(0, batch.target_index)

    def _of_all_ranks(self, rows: Tensor, batch: Batch) -> Tensor:
        """What tensor ranks have for their own tokens [t, ...] of `batch` -> [T, ...]."""
        if self._tensor is None:
            return rows
        gathered, size = gather_tensor(rows, self._tensor, 0), self._tensor.size
        if batch.sequence is None or len(batch.sequence.parts) == 1:
            return gathered
        own = [part.share // size for part in batch.sequence.parts]
        return torch.cat([part.flatten(0, 1) for part in gathered.unflatten(0, (size, -1)).split(own, dim=1)])


def _project(hidden: Tensor, layer: nn.Linear, pieces: list[int] | None) -> Tensor:
    """The head's output [N, V] for hidden states [N, H]; each piece of so many rows apart from the others."""
    if pieces is None:
        return nn.functional.linear(hidden, layer.weight, layer.bias)
    return torch.cat([nn.functional.linear(part.clone(), layer.weight, layer.bias) for part in hidden.split(pieces)])


def _router_loss(model: PreTrainedModel) -> Callable[[Any], Tensor] | None:
    """The model family's own load-balancing loss, where its config asks for one (output_router_logits).

    The family's function looks at one micro batch: all its tokens, padding included, over all layers. What is trained
    on, and reported, is the mean over the micro batches of a global batch, weighted by their tokens. So it depends on
    how samples were packed into micro batches, and on nothing else: not on which ranks run them, nor on how many share
    one (the ranks' router logits are gathered), nor on where the experts lie.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    family = sys.modules[
        next(cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers.")).__module__
    ]
    if not hasattr(family, "load_balancing_loss_func"):
        raise ValueError(
            f"the config of {type(model).__name__} sets output_router_logits, but the family has no router loss: "
            "set it to false"
        )
    coefficient, top_k = config.router_aux_loss_coef, config.num_experts_per_tok
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts

    def compute(router_logits: Any) -> Tensor:
        return coefficient * family.load_balancing_loss_func(router_logits, num_experts, top_k)

    return compute


def source_sums(batch: Batch, losses: Tensor, num_sources: int) -> Tensor:
    """The losses [N] of a batch's targets, summed by data source: fp32 [num_sources], on the losses' device."""
    if batch.pairs is not None:
        source = batch.pairs.source
    else:
        sample = torch.bucketize(batch.target_index, batch.cu_seqlens[1:], right=True)
        source = batch.sample_sources.index_select(0, sample)
    return losses.new_zeros(num_sources).index_add_(0, source, losses)
