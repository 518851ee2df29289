"""Image generation by codes: a chat model is trained on its assistant turns, including the codes of the images in them.

The targets are tokens (`text`) and image codes (`code`), each predicted with cross-entropy.

Samples contain a placeholder for each code. `prepare` puts the codes into the tokens and labels of whole micro batches,
before ranks split them, so that from there on a code is a token beyond the vocabulary. The codes come from a frozen
image tokenizer, which encodes each batch's images, or all images once before training (model.encode_target).

With train.cfg_dropout the prompts of some pictures are hidden: their tokens are replaced by one that carries no
meaning. Generation compares predictions with and without the prompt (classifier-free guidance, arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import DRAWN_PIXELS, IGNORE, Batch, GlobalBatch
from tutti.core.keyed_random import generator
from tutti.infer.drawing import Hidden, hiding
from tutti.model.omni import CodeDecoder
from tutti.model.vq import PictureTokenizer
from tutti.train.head import Head
from tutti.train.tasks import Prepare, Split, Sums
from tutti.train.tasks.weighted_losses import WeightedLosses

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.run_parts import Run


@dataclass(frozen=True)
class CodeDrawing(WeightedLosses):
    """Sums over tokens and codes. dropout: train.cfg_dropout."""

    kinds: tuple[str, ...] = ("text", "code")
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> CodeDrawing:
        """The task of a configuration."""
        weights = cls.weights_of(config, cls.kinds)
        return cls(weights=weights, dropout=config.train.cfg_dropout, seed=config.train.seed)

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        targets, first = head.targets, head.codes.first
        drawn = head.codes.holds(targets)
        places = (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
        text, texts = head.cross_entropy_of(hidden[places[0]], targets[places[0]])
        code, codes = head.code_cross_entropy(hidden[places[1]], targets[places[1]] - first)
        losses = texts.new_zeros(len(targets)).index_copy_(0, places[0], texts).index_copy_(0, places[1], codes)
        found = {"text": (text, (~drawn).sum() * head.share), "code": (code, drawn.sum() * head.share)}
        sources = head.batch.segment_sources[head.batch.target_segment]
        return {**self.total(found, head.batch.payload), **self.by_source(losses, sources)}

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        model: Any = run.placed.model
        codes_of, coder = model.code_decoder, _coder(run, model)
        known = _codes_of_all(run, coder) if coder is not None and run.config.model.encode_target else None
        if known is not None and not run.config.data.silent_exception:  # else what is broken has to be found out
            run.data.leave_out_drawn()
        sharing = run.mesh.grid.size() // run.mesh.dp_size
        hidden = hiding(run.inputs.tokenizer, model)

        def complete(batch: GlobalBatch, split: Split) -> GlobalBatch:
            micros: list[Batch] = []
            key = (self.seed, batch.epoch)
            for micro, names in zip(batch.micro_batches, batch.names, strict=True):
                codes = None if known is None else [known[split][name] for name in names]
                if coder is not None:
                    all_codes = None if codes is None else torch.cat([*codes, torch.zeros(0, dtype=torch.int64)])
                    micro = coder(micro, all_codes)
                if split == "train" and self.dropout:
                    drawn = codes_of.holds(micro.labels)
                    micro = hide_prompts(micro, names, drawn, key, self.dropout, hidden)
                micros.append(micro)
            return self.with_scales(
                replace(batch, micro_batches=tuple(micros)), count_labels(micros, codes_of.holds), run.world, sharing
            )

        def with_codes(batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
            return (complete(batch, split) for batch in batches)

        return with_codes


def hide_prompts(
    micro: Batch, names: Sequence[Any], drawn: Tensor, key: tuple[int, int], dropout: float, hidden: Hidden
) -> Batch:
    """The micro batch with the prompts of some samples hidden, each with probability `dropout`.

    drawn: bool [T], True for labels of image codes; samples without any are unchanged. key: seed and epoch, which
    together with the sample's name determine the choice.
    """
    ids, borders = micro.input_ids.clone(), micro.cu_seqlens.tolist()
    for name, begin, end in zip(names, borders, borders[1:], strict=False):
        if not drawn[begin:end].any():
            continue
        if float(torch.rand((), generator=generator(*key, name, "guidance"))) < dropout:
            prompt = int((micro.labels[begin:end] != IGNORE).nonzero()[0]) + 1
            ids[begin : begin + prompt] = torch.tensor(hidden(ids[begin : begin + prompt].tolist()))
    return replace(micro, input_ids=ids)


def count_labels(micros: Iterable[Batch], drawn_among: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Count the labels that are tokens, and those that are parts of images, which `drawn_among` identifies."""
    labels = torch.cat([micro.labels for micro in micros])
    drawn = int(drawn_among(labels).sum())
    return int((labels != IGNORE).sum()) - drawn, drawn


@dataclass(frozen=True)
class Coder:
    """Replaces placeholders by codes. placeholder: the placeholder's id. decoder: the model's module for codes.
    encode: returns the codes [N, n] of images."""

    placeholder: int
    decoder: CodeDecoder
    encode: Callable[[Tensor], Tensor]

    def __call__(self, micro: Batch, codes: Tensor | None = None) -> Batch:
        """The micro batch with codes in its tokens and labels, and without images. codes: int64, of all its images
        one after the other; computed from the images if not given."""
        extras = {name: value for name, value in micro.extras.items() if name != DRAWN_PIXELS}
        if DRAWN_PIXELS not in micro.extras:
            return micro
        if codes is None:
            codes = self.encode(micro.extras[DRAWN_PIXELS]).flatten()
        ids, labels = micro.input_ids.clone(), micro.labels.clone()
        places = ids == self.placeholder
        ids[places] = codes + self.decoder.first
        # A placeholder that is trained on is the target of the token before it.
        targets = labels == self.placeholder
        labels[targets] = ids.roll(-1)[targets]
        if micro.input_ids.is_pinned():
            ids, labels = ids.pin_memory(), labels.pin_memory()
        return replace(micro, input_ids=ids, labels=labels, extras=extras)


def _coder(run: Run, model: Any) -> Coder | None:
    """The coder of a run; None if the run has no images to draw, and so needs no image tokenizer."""
    data, processor = run.data, run.inputs.processor
    known = data.has_media is not None and not data.evaluation_sources
    if processor is None or (known and not data.report.media.numbers["drawn"]):
        return None
    pictures = PictureTokenizer(model.drawing_folder, run.world.device, size=model.drawing_size)
    return Coder(processor.drawn_token_ids[0], model.code_decoder, pictures.encode)


def _codes_of_all(run: Run, coder: Coder) -> dict[Split, dict[Any, Tensor]]:
    """The codes of each sample's images, by the sample's name, for all training and evaluation data. Each rank
    encodes its share. Collective."""
    parts: dict[Split, Iterable[GlobalBatch]] = {"train": run.data.scan()}
    if run.data.evaluation_sources:
        parts["eval"] = run.data.evaluate()
    found: dict[Split, dict[Any, Tensor]] = {}
    for split, batches in parts.items():
        mine: dict[Any, Tensor] = {}
        for batch in batches:
            for micro, names in zip(batch.micro_batches, batch.names, strict=True):
                done = coder(micro)
                borders = micro.cu_seqlens.tolist()
                for name, begin, end in zip(names, borders, borders[1:], strict=False):
                    ids = done.input_ids[begin:end]
                    mine[name] = ids[coder.decoder.holds(ids)] - coder.decoder.first
        found[split] = {name: codes for part in run.world.gather(mine) for name, codes in part.items()}
    return found
