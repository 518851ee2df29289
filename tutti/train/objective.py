"""The objective: a model and its task's loss as one module, from a packed batch to sums.

`Objective` is the root module that is parallelized. It runs the decoder, selects the hidden states at the batch's
targets, and passes them to the task together with the output head (`tutti.train.head`). Head and loss are fused, so the
logits of a whole batch never exist; logit scaling and soft-capping are part of the head. The result is sums, never
means, because the divisor is a property of the global batch.

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
"""A function of the hidden states at a batch's targets [N, H] and the head; for a model without a head, of the model
and the batch."""


class Objective(nn.Module):
    """The model with its task.

    sizes: the number of values of each sum, by name. work: counts the floating-point operations of training the whole
    model on a micro batch, also on a rank with only a part of its depth.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task | None = None,
        tensor: RankGroup | None = None,
        *,
        structure: ModelStructure | None = None,
        by_sample: bool = False,
    ) -> None:
        """task: default language modelling. structure: default read from the model. tensor: the ranks of tensor
        parallelism, which have the same targets; each returns an equal share of every sum. by_sample: apply the head to
        each sample separately (train.enable_batch_invariant_mode)."""
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
        """Returns the task's sums over the micro batch, plus `router_loss`: the auxiliary loss of a mixture of experts,
        weighted by its coefficient, times the batch's tokens. With `compute`, returns its result instead.

        stage: the pipeline stage to run, given what was `received` from the previous stage. Every stage but the last
        returns what the next one is to receive.
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
            # Not a sum over tokens: it needs the router's logits of the whole batch that ranks share.
            router_loss = self._router_loss(self._routed(states, batch))
            sums["router_loss"] = router_loss * (batch.num_tokens * head.share)
        return sums

    def run_model(self, inputs: Mapping[str, Any], extras: Mapping[str, Tensor]) -> Any:
        """The output of the model's own forward pass, for generation with a key/value cache. extras: values of the
        media of new prompts."""
        if self._multimodal is None:
            return self.model(**inputs)
        return self._multimodal.generate(self.model, inputs, extras)

    def _head(self, batch: Batch) -> Head:
        pieces = None
        if self._by_sample:  # synchronizes with the device
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
        """The router logits [T, E] of each layer for all tokens of the batch except padding."""
        layers = by_layer(states.router_logits, states.last_hidden_state.shape[1])
        rows = (gather_tokens(self._of_all_ranks(logits, batch), batch.sequence) for logits in layers)
        # Padding comes last. A batch of only padding keeps one token, so that the loss is defined; it is multiplied by
        # 0 later.
        count = max(1, (batch.sequence or batch).num_tokens)
        return tuple(logits[:count] for logits in rows)

    def _of_all_ranks(self, rows: Tensor, batch: Batch) -> Tensor:
        """Gather the rows [t, ...] that each tensor rank has for its own tokens of `batch` into [T, ...]."""
        if self._tensor is None:
            return rows
        gathered, size = gather_tensor(rows, self._tensor, 0), self._tensor.size
        if batch.sequence is None or len(batch.sequence.parts) == 1:
            return gathered
        own = [part.share // size for part in batch.sequence.parts]
        return torch.cat([part.flatten(0, 1) for part in gathered.unflatten(0, (size, -1)).split(own, dim=1)])


def logits(hidden: Tensor, head: Head) -> Tensor:
    """The model's logits [N, V] at the targets: a `compute` function for `Objective`."""
    return head.logits(hidden)


def _router_loss(model: PreTrainedModel) -> Callable[[Any], Tensor] | None:
    """The model family's own load-balancing loss, if its config asks for it (output_router_logits).

    The loss covers one micro batch: all of its tokens except padding, over all layers. The value that is trained on and
    reported is the mean over the micro batches of a global batch, weighted by their tokens. It therefore depends on how
    samples are packed into micro batches, but not on which ranks run them, how many ranks share one (router logits are
    gathered), or where experts are.
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
