"""The objective: a model and its task's loss as one module, from a packed batch to sums.

`Objective` is the root that is parallelized. It runs the model's decoder for hidden states, takes those at the batch's
targets, and hands them to the task with the output head (`tutti.train.head`), which is fused with the loss, so that
logits of a whole batch never exist; logit scaling and soft-capping come along as data. Sums leave here, never means:
what they are divided by is a matter of the global batch.

Shapes: T tokens of a batch, N targets, H hidden size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutti.attention.interface import packed_kwargs
from tutti.core.batch import Batch
from tutti.core.collectives import RankGroup, gather_tensor
from tutti.core.structure import ModelStructure
from tutti.model.multimodal import MultimodalForward
from tutti.model.structure import causal_lm, read_structure
from tutti.parallel.pipeline.stage import Handoff, Stage, by_layer, make_handoff
from tutti.parallel.sequence import gather_tokens
from tutti.train.head import Head
from tutti.train.loss import VocabularyShard
from tutti.train.tasks import Sums, Task, WholeModelTask
from tutti.train.tasks.language import LanguageModelling

Compute = Callable[[Any, Any], Any]
"""From the hidden states at a batch's targets [N, H] and the head to what is wanted of them; of a model without a head,
from the model and the batch."""


class Objective(nn.Module):
    """The model with its task. sizes: how many values each of its sums has, by name. work: counts the operations of
    training the whole model on a micro batch, also where a rank has a part of its depth."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task | None = None,
        tensor: RankGroup | None = None,
        *,
        structure: ModelStructure | None = None,
        by_sample: bool = False,
    ) -> None:
        """task: language modelling if left out. structure: of the model, read off it if left out. tensor: the ranks
        that split the model's matrices; they have the same targets, and each answers for an equal share of every sum.
        by_sample: apply the head to each sample's targets apart from the others' (train.enable_batch_invariant_mode).
        """
        super().__init__()
        self.model = model
        self.task = task or LanguageModelling()
        self.structure = structure or read_structure(model)
        whole = self.task if isinstance(self.task, WholeModelTask) else None
        self.work = self.task.flop_counter(model)
        self._by_sample = by_sample
        self._tensor = tensor
        self._shard: VocabularyShard | None = None
        if tensor is not None and not self.structure.classifies:
            if self.structure.transform.masked is not None:
                raise ValueError(
                    f"train.tensor_parallel_size: {self.structure.name} never predicts some of its tokens, which a "
                    "divided head does not know; set 1"
                )
            rows = self.structure.head.out_features
            self._shard = VocabularyShard(tensor.start(rows), tensor.group, tensor.size)
        self._multimodal = MultimodalForward(self.structure, tensor) if self.structure.towers else None
        self._router_loss = _router_loss(model) if whole is None else None
        self.has_router_loss = self._router_loss is not None
        self.sizes = self.task.sizes() | ({"router_loss": 1} if self.has_router_loss else {})

    def forward(
        self,
        batch: Batch,
        *,
        compute: Compute | None = None,
        stage: Stage | None = None,
        received: Handoff | None = None,
    ) -> Sums | Handoff | Any:
        """The task's sums over the micro batch, and `router_loss`: the auxiliary loss of a mixture of experts (already
        weighted by its coefficient) times the batch's tokens. Or what `compute` makes of the hidden states.

        stage: the part of the model's depth to run, on what was `received` from the stage before. Unless it is the
        last one, what the next is to receive is returned.
        """
        if isinstance(self.task, WholeModelTask):
            return self.task.run(self.model, batch) if compute is None else compute(self.model, batch)
        if batch.extras and self._multimodal is None:
            name = self.structure.name
            raise ValueError(f"{name} has nothing beside a language model that could take {', '.join(batch.extras)}")
        options = {"output_router_logits": True} if self.has_router_loss else {}
        if self._multimodal is not None:
            states = self._multimodal.run(batch, stage, received, **options)
        elif stage is None:
            states = self.structure.decoder(**packed_kwargs(batch), **options)
        else:
            states = stage.run(self.structure.decoder, packed_kwargs(batch) | options, received)
        if stage is not None and not stage.is_last:
            return make_handoff(states)
        every = self._of_all_ranks(states.last_hidden_state.squeeze(0), batch)
        hidden = every.index_select(0, batch.target_index)
        head = replace(self._head(batch), states=every, features=getattr(states, "drawn_features", None))
        if compute is not None:
            return compute(hidden, head)
        sums = self.task.loss(hidden, head)
        if self._router_loss is not None:
            # Not a sum over tokens: it takes the router's logits of a batch that ranks share as a whole.
            router_loss = self._router_loss(self._routed(states, batch))
            sums["router_loss"] = router_loss * (batch.num_tokens * head.share)
        return sums

    def run_model(self, inputs: Mapping[str, Any], extras: Mapping[str, Tensor]) -> Any:
        """The output of the model's own forward pass, for generation with a cache of keys and values. extras: the
        values of new prompts' media."""
        if self._multimodal is None:
            return self.model(**inputs)
        return self._multimodal.generate(self.model, inputs, extras)

    def _head(self, batch: Batch) -> Head:
        pieces = None
        if self._by_sample:  # waits for the device
            sample = torch.bucketize(batch.target_index, batch.cu_seqlens[1:], right=True)
            pieces = sample.bincount(minlength=len(batch.cu_seqlens) - 1).tolist()
        structure = self.structure
        return Head(
            structure.head,
            structure.transform,
            batch,
            self._tensor,
            self._shard,
            pieces,
            codes=getattr(self.model, "code_decoder", None),
            feature_head=getattr(self.model, "feature_head", None),
            flow=getattr(self.model, "flow_decoder", None),
        )

    def _routed(self, states: Any, batch: Batch) -> tuple[Tensor, ...]:
        """The routers' logits of each layer for all of the batch's tokens that are not padding [T, E]."""
        layers = by_layer(states.router_logits, states.last_hidden_state.shape[1])
        rows = (gather_tokens(self._of_all_ranks(logits, batch), batch.sequence) for logits in layers)
        # Padding comes last. Of a batch of nothing else one token stays, for a loss that is defined and counts 0 times.
        count = max(1, (batch.sequence or batch).num_tokens)
        return tuple(logits[:count] for logits in rows)

    def _of_all_ranks(self, rows: Tensor, batch: Batch) -> Tensor:
        """Gather rows that tensor ranks have for their own tokens [t, ...] of `batch` -> [T, ...]."""
        if self._tensor is None:
            return rows
        gathered, size = gather_tensor(rows, self._tensor, 0), self._tensor.size
        if batch.sequence is None or len(batch.sequence.parts) == 1:
            return gathered
        own = [part.share // size for part in batch.sequence.parts]
        return torch.cat([part.flatten(0, 1) for part in gathered.unflatten(0, (size, -1)).split(own, dim=1)])


def logits(hidden: Tensor, head: Head) -> Tensor:
    """The model's logits [N, V] at the targets, whatever these are: a `compute` of `Objective`."""
    return head.logits(hidden)


def _router_loss(model: PreTrainedModel) -> Callable[[Any], Tensor] | None:
    """The model family's own load-balancing loss, where its config asks for one (output_router_logits).

    The family's function looks at one micro batch: all its tokens but padding, over all layers. What is trained
    on, and reported, is the mean over the micro batches of a global batch, weighted by their tokens. So it depends on
    how samples were packed into micro batches, and on nothing else: not on which ranks run them, nor on how many share
    one (the ranks' router logits are gathered), nor on where the experts lie.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    family = sys.modules[
        next(cls for cls in type(causal_lm(model)).__mro__ if cls.__module__.startswith("transformers.")).__module__
    ]
    if not hasattr(family, "load_balancing_loss_func") or not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(
            f"the config of {type(model).__name__} sets output_router_logits, but the family has no router loss that "
            "is known here: set it to false"
        )
    coefficient, top_k = config.router_aux_loss_coef, config.num_experts_per_tok
    num_experts = getattr(config, "num_experts", None) or config.num_local_experts

    def compute(router_logits: Any) -> Tensor:
        return coefficient * family.load_balancing_loss_func(router_logits, num_experts, top_k)

    return compute
