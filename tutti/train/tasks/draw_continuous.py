"""Image generation without codes: a chat model is trained on its assistant turns, and on continuous targets for their
images.

In addition to tokens (`text`) there are one or both of:

- `feature` (model.output_encoder encoder): the features of images, which the tower computes in the forward pass
  (`tutti.model.feature_head`), are predicted by the hidden states before them.
- `flow` (a diffusion decoder, `tutti.model.flow_decoder`): a diffusion transformer, conditioned on the hidden states of
  an image's queries, denoises the image's latents, which come with the batch (`tutti.train.flow_targets`). The loss of
  an image is the mean over its latents' values.

Samples contain placeholders until ranks split a micro batch. A label that is a placeholder is replaced by the index of
its feature in the micro batch, or of its query in the image, offset beyond all tokens, so that every rank knows what
its own tokens predict. Ranks that share a batch exchange the hidden states of queries, and each runs the transformer on
its share of the images.

With train.cfg_dropout the prompts of some images are hidden, as with codes (`tutti.train.tasks.draw_codes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import DRAWN_PIXELS, Batch, GlobalBatch
from tutti.infer.drawing import hiding
from tutti.model.denoiser_flops import DenoiserFlops
from tutti.model.diffusion import EncodedText, add_noise, predict, squared_errors
from tutti.model.encoder_parallel import encoder_ranks
from tutti.model.flow_decoder import FlowSpec, read_flow
from tutti.model.omni_config import regresses
from tutti.parallel.sequence import gather_tokens
from tutti.train.head import Head
from tutti.train.tasks import Prepare, Split, Sums, Work
from tutti.train.tasks.diffusion import LATENTS, NOISE, SOURCES, TIMES, WEIGHTS, Denoising
from tutti.train.tasks.draw_codes import count_labels, hide_prompts
from tutti.train.tasks.weighted_losses import WeightedLosses

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.run_parts import Run


PICTURE, PLACES = "picture", "places"
"""Names in a micro batch's payload: the index of each latent row's image, int64 [R], and the positions of images'
queries among the tokens, int64 [P, Q]."""


@dataclass(frozen=True)
class ContinuousDrawing(WeightedLosses):
    """Sums over tokens, and over features or images. times: samples noise and times. spec: the diffusion decoder."""

    times: Denoising = field(default_factory=Denoising)
    spec: FlowSpec | None = None

    @classmethod
    def of(cls, config: Config) -> ContinuousDrawing:
        """The task of a configuration."""
        spec = read_flow(config.model)
        kinds = ("text", *(["feature"] if regresses(config.model) else []), *([] if spec is None else ["flow"]))
        times = Denoising.of(config, None if spec is None else spec.folder)
        return cls(kinds=kinds, weights=cls.weights_of(config, kinds), times=times, spec=spec)

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        targets, batch = head.targets, head.batch
        first = (head.feature_head or head.flow).first
        drawn = targets >= first
        places = (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
        text, texts = head.cross_entropy_of(hidden[places[0]], targets[places[0]])
        found = {"text": (text, (~drawn).sum() * head.share)}
        losses = texts.new_zeros(len(targets)).index_copy_(0, places[0], texts)
        if "feature" in self.kinds:
            apart = head.feature_losses(hidden[places[1]], targets[places[1]] - first)
            losses.index_copy_(0, places[1], apart.detach().to(losses.dtype))
            found["feature"] = (apart.sum(), drawn.sum() * head.share)
        by_source = self.by_source(losses, batch.segment_sources[batch.target_segment])
        if self.spec is not None:
            flow, weights, sources = self._flow(head)
            found["flow"] = (flow.sum(), weights.sum())
            # A picture's loss is counted for each of its queries.
            for name, sums in self.by_source(flow.detach().to(losses.dtype) * self.spec.tokens, sources).items():
                by_source[name] = by_source[name] + sums
        return {**self.total(found, batch.payload), **by_source}

    def _flow(self, head: Head) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted losses fp32 [r] of this rank's share of a micro batch's latent rows, their weights and their
        sources."""
        batch, given = head.batch, head.batch.payload
        assert head.states is not None
        own = slice(None)
        if batch.sequence is not None:
            ranks = encoder_ranks(batch.sequence.ranks, head.tensor)
            own = slice(ranks.place, None, ranks.size)
        latents, noise, times, weights, sources, picture = (
            given[name][own] for name in (LATENTS, NOISE, TIMES, WEIGHTS, SOURCES, PICTURE)
        )
        text = head.flow.text(gather_tokens(head.states, batch.sequence)[given[PLACES]])
        led = text.map(lambda part: part[picture])
        losses = flow_losses(head.flow, self.times.scheduler, latents, noise, times, led)
        return losses * weights, weights, sources

    def flop_counter(self, model: Any) -> Work:
        text, spec = super().flop_counter(model), self.spec
        if spec is None:
            return text
        decoder: Any = model.flow_decoder
        count = DenoiserFlops(spec.net, decoder.net.parameters())
        width, pooled = decoder.project[-1].out_features, decoder.pool and decoder.pool.out_features
        return lambda micro: text(micro) + count(micro.payload[LATENTS].shape, spec.tokens, width, pooled)

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        from tutti.train.flow_targets import make_targets  # which looks at runs, and so imports the tasks

        model: Any = run.placed.model
        placeholder, first = run.inputs.processor.drawn_token_ids[0], model.config.first_code
        targets = None if self.spec is None else make_targets(run, self.spec, self.times)
        sharing = run.mesh.grid.size() // run.mesh.dp_size

        def complete(batch: GlobalBatch, split: Split) -> GlobalBatch:
            micros: list[Batch] = []
            for micro, names in zip(batch.micro_batches, batch.names, strict=True):
                beside = {} if targets is None else targets.payload(micro, names, batch.step, split)
                numbered = number_parts(micro, placeholder, first, None if self.spec is None else self.spec.tokens)
                if targets is not None and split == "train" and self.times.dropout:
                    drawn, key = numbered.labels >= first, (self.times.seed, batch.epoch)
                    hidden = hiding(run.inputs.tokenizer, model)
                    numbered = hide_prompts(numbered, names, drawn, key, self.times.dropout, hidden)
                micros.append(replace(numbered, payload={**numbered.payload, **beside}))
            return self.with_scales(
                replace(batch, micro_batches=tuple(micros)), self._count(micros, first), run.world, sharing
            )

        def with_parts(batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
            return (complete(batch, split) for batch in batches)

        return with_parts

    def _count(self, micros: Sequence[Batch], first: int) -> list[int]:
        """Count the targets by kind."""
        text, drawn = count_labels(micros, lambda labels: labels >= first)
        counts = {"text": text, "feature": drawn}
        if self.spec is not None:
            counts["flow"] = round(sum(float(micro.payload[WEIGHTS].sum()) for micro in micros))
        return [counts[kind] for kind in self.kinds]


def flow_losses(flow: Any, scheduler: Any, latents: Tensor, noise: Tensor, times: Tensor, text: EncodedText) -> Tensor:
    """The mean squared error fp32 [R] of a diffusion decoder's predictions for latents [R, C, H, W] mixed with noise
    at times [R] in [0, 1]."""
    noised = add_noise(flow.family, scheduler, latents, noise, times)
    found = predict(flow.family, flow.net, noised.latents.to(text.embeds.dtype), noised.times, text)
    return squared_errors(found, noised.target)


def number_parts(micro: Batch, placeholder: int, first: int, queries: int | None) -> Batch:
    """The micro batch with placeholder labels replaced by `first` plus an index: the placeholder's index in the
    micro batch, or with `queries` (per image) its index in the image; tokens are then replaced likewise."""
    there = micro.input_ids == placeholder
    numbers = there.cumsum(0) - 1
    extras = {name: value for name, value in micro.extras.items() if name != DRAWN_PIXELS}
    ids = micro.input_ids
    if queries is not None:
        numbers = numbers % queries
        ids = torch.where(there, first + numbers, ids)
    # A placeholder that is trained on is the target of the token before it.
    labels = torch.where(micro.labels == placeholder, first + numbers.roll(-1), micro.labels)
    if micro.input_ids.is_pinned():
        ids, labels = ids.pin_memory(), labels.pin_memory()
    return replace(micro, input_ids=ids, labels=labels, extras=extras)
