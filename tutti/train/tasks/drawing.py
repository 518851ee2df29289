"""Drawing: a chat is trained on its assistant turns, and pictures in these on the codes that they are drawn by.

What is trained on are tokens (`text`) and codes (`code`), by the cross-entropy of each given what is before it. The
loss of a step is the sum over both kinds of weight * (sum of losses / number of targets) over the global batch. These
numbers are found before the step, in the labels of all ranks' micro batches.

Samples hold a placeholder for each code; `prepare` puts codes into the tokens and labels of whole micro batches, before
ranks share one, so that from there on a code is a token beyond the vocabulary. They come from a frozen tokenizer of
pictures, which makes them of each batch's pictures anew, or once for all samples before training (model.encode_target).

With train.cfg_dropout the prompts of some pictures are hidden: their tokens become one that means nothing. Generation
compares what is drawn then with what is drawn otherwise (classifier-free guidance, arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import DRAWN_PIXELS, IGNORE, Batch, GlobalBatch
from tutti.core.dist import World
from tutti.core.draws import generator
from tutti.infer.drawing import Hidden, hiding
from tutti.model.omni import CodeDecoder
from tutti.model.vq import PictureTokenizer
from tutti.train.head import Head
from tutti.train.tasks import Prepare, Split, Sums, Task

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.record import Run

KINDS = ("text", "code")
SCALES = "loss_scales"
"""The name, in a batch's payload, of fp64 [2]: what the sums of both kinds are multiplied with, so that their sum
divided by the number of all targets is the step's loss."""


@dataclass(frozen=True)
class Drawing(Task):
    """Sums over targets by kind, and their numbers. weights: of the kinds. dropout: train.cfg_dropout."""

    sums: ClassVar = {name: 1 for kind in KINDS for name in (kind, f"{kind}_targets")}
    weights: Mapping[str, float] = field(default_factory=dict)
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> Drawing:
        """The task of a configuration."""
        weights = {**config.data.task.losses, **config.train.loss_weights}
        return cls(weights=weights, dropout=config.train.cfg_dropout, seed=config.train.seed)

    def loss(self, hidden: Tensor, head: Head) -> Sums:
        targets, first = head.targets, head.codes.first
        drawn = head.codes.holds(targets)
        places = (~drawn).nonzero().flatten(), drawn.nonzero().flatten()
        text, texts = head.cross_entropy_of(hidden[places[0]], targets[places[0]])
        code, codes = head.code_cross_entropy(hidden[places[1]], targets[places[1]] - first)
        scales = head.batch.payload[SCALES].to(text.dtype)
        losses = texts.new_zeros(len(targets)).index_copy_(0, places[0], texts).index_copy_(0, places[1], codes)
        return {
            "loss": text * scales[0] + code * scales[1],
            "text": text.detach(),
            "code": code.detach(),
            "text_targets": (~drawn).sum(),
            "code_targets": drawn.sum(),
            **self.by_source(losses, head.batch.segment_sources[head.batch.target_segment]),
        }

    def mean_loss(self, sums: Mapping[str, Any], num_targets: int) -> float:
        means = (self.weights[kind] * sums[kind] / max(1, sums[f"{kind}_targets"]) for kind in KINDS)
        return float(sum(means))

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for kind in KINDS:
            count = sums[f"{kind}_targets"]
            found |= {f"targets/{kind}": count} | ({f"loss/{kind}": sums[kind] / count} if count else {})
        return found

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        model: Any = run.placed.model
        pictures = PictureTokenizer(model.drawing_folder, run.world.device, size=model.drawing_size)
        codes_of = model.code_decoder
        coder = Coder(run.inputs.processor.drawn_token_ids[0], codes_of, pictures.encode)
        known = _codes_of_all(run, coder) if run.config.model.encode_target else None
        sharing = run.mesh.grid.size() // run.mesh.dp_size
        hidden = hiding(run.inputs.tokenizer, model)

        def complete(batch: GlobalBatch, split: Split) -> GlobalBatch:
            micros = []
            for micro, names in zip(batch.micro_batches, batch.names, strict=True):
                codes = None if known is None else [known[split][name] for name in names]
                micro = coder(micro, None if codes is None else torch.cat([*codes, torch.zeros(0, dtype=torch.int64)]))
                if split == "train" and self.dropout:
                    micro = self._hidden(micro, names, batch.epoch, codes_of, hidden)
                micros.append(micro)
            return _with_scales(replace(batch, micro_batches=tuple(micros)), self.weights, codes_of, run.world, sharing)

        def with_codes(batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
            return (complete(batch, split) for batch in batches)

        return with_codes

    def _hidden(self, micro: Batch, names: Sequence[Any], epoch: int, codes: CodeDecoder, hidden: Hidden) -> Batch:
        """The micro batch with the prompts of some pictures hidden."""
        ids, borders = micro.input_ids.clone(), micro.cu_seqlens.tolist()
        for name, begin, end in zip(names, borders, borders[1:], strict=False):
            labels = micro.labels[begin:end]
            if not codes.holds(labels).any():
                continue
            if float(torch.rand((), generator=generator(self.seed, epoch, name, "guidance"))) < self.dropout:
                prompt = int((labels != IGNORE).nonzero()[0]) + 1
                ids[begin : begin + prompt] = torch.tensor(hidden(ids[begin : begin + prompt].tolist()))
        return replace(micro, input_ids=ids)


@dataclass(frozen=True)
class Coder:
    """Puts codes in the place of their placeholders. placeholder: its id. decoder: what the model has for codes.
    encode: from pictures to codes [N, n]."""

    placeholder: int
    decoder: CodeDecoder
    encode: Callable[[Tensor], Tensor]

    def __call__(self, micro: Batch, codes: Tensor | None = None) -> Batch:
        """The micro batch with codes among its tokens and labels, and without pictures. codes: int64 of all its
        pictures, one after the other; made of these if left out."""
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


def _codes_of_all(run: Run, coder: Coder) -> dict[Split, dict[Any, Tensor]]:
    """The codes of each sample's pictures, by the sample's name, of all training and evaluation data. Each rank makes
    those of its share. Collective."""
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


def _with_scales(
    batch: GlobalBatch, weights: Mapping[str, float], codes: CodeDecoder, world: World, sharing: int
) -> GlobalBatch:
    """The batch with the factors of both kinds' sums. sharing: how many ranks have the same batch. Collective."""
    drawn = sum(int(codes.holds(micro.labels).sum()) for micro in batch.micro_batches)
    count = sum(world.gather(drawn)) // sharing
    counts = {"text": batch.num_targets - count, "code": count}
    factors = [weights[kind] * batch.num_targets / max(1, counts[kind]) for kind in KINDS]
    scales = {SCALES: torch.tensor(factors, dtype=torch.float64)}
    micros = tuple(replace(micro, payload={**micro.payload, **scales}) for micro in batch.micro_batches)
    return replace(batch, micro_batches=micros)
