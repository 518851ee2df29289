"""Training targets for pictures that a language model generates with a diffusion decoder (`tutti.model.flow_decoder`).

Each picture that is trained on gets a payload like a sample of diffusion training (`tutti.train.tasks.diffusion`): the
latents of the frozen autoencoder, noise, a time, and a weight. All random numbers depend only on the seed, the step,
the sample and the picture's index. Latents are computed for each batch, or with model.encode_target once into files
below `output_dir/cache`; the numbers are the same.

Each micro batch has at least as many rows as there are ranks that share it, filled up with pictures of weight 0. So
every rank runs the transformer once per micro batch, which keeps its collectives in step and its gradients defined.

Shapes: P pictures of a micro batch, Q queries per picture, R rows of latents: one per picture in training, several
(`EVAL_TIMES`) in evaluation.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutti.checkpoint.hf_files import weights_digest
from tutti.core.batch import DRAWN_PIXELS, Batch
from tutti.core.compute_dtype import compute_dtype
from tutti.core.keyed_random import generator
from tutti.model.conditions import Conditions
from tutti.model.flow_decoder import FlowSpec
from tutti.train.latents import CACHE, Cached, is_written, micro_batches_of, writing
from tutti.train.run_parts import Run
from tutti.train.tasks import Split
from tutti.train.tasks.diffusion import EVAL_TIMES, LATENTS, NOISE, SOURCES, TIMES, WEIGHTS, Denoising
from tutti.train.tasks.draw_continuous import PICTURE, PLACES

log = logging.getLogger(__name__)


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert values in [-1, 1] to uint8."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


@dataclass(frozen=True)
class PictureTargets:
    """Makes the payload of micro batches.

    placeholder: the token id of queries. spec: the diffusion decoder. times: samples times and noise. latents: returns
    the latents [p, C, H, W] of a sample's pictures, from split, name and, if needed, pixels. least: minimum number of
    rows of a micro batch.
    """

    placeholder: int
    spec: FlowSpec
    times: Denoising
    latents: Callable[[Split, Any, Tensor], Tensor]
    least: int = 1

    def payload(self, micro: Batch, names: Sequence[Any], step: int, split: Split) -> dict[str, Tensor]:
        """The payload of a micro batch that still has placeholders for its pictures."""
        queries, shape = self.spec.tokens, self.spec.latents
        rows: list[tuple[int, Tensor, Tensor, float, float, int]] = []
        places: list[Tensor] = []
        used = 0
        for segment, (begin, end) in enumerate(pairwise(micro.cu_seqlens.tolist())):
            own = (micro.input_ids[begin:end] == self.placeholder).nonzero().view(-1, queries) + begin
            if not len(own):
                continue
            pixels = micro.extras[DRAWN_PIXELS][used : used + len(own)]
            used += len(own)
            latents, source = self.latents(split, names[segment], pixels), int(micro.segment_sources[segment])
            for number, where in enumerate(own):
                if micro.labels[where[0] - 1] != self.placeholder:  # not trained on
                    continue
                for key, time, weight in self._draws(split, step, names[segment], number):
                    noise = torch.randn(shape, generator=generator(self.times.seed, *key, "noise"))
                    rows.append((len(places), latents[number], noise, time, weight, source))
                places.append(where)
        if len(rows) < self.least:
            blank = torch.zeros(shape)
            places = places or [torch.zeros(queries, dtype=torch.int64)]
            rows += [(0, blank, blank, 0.5, 0.0, 0)] * (self.least - len(rows))
        found = {
            PLACES: torch.stack(places),
            PICTURE: torch.tensor([row[0] for row in rows], dtype=torch.int64),
            LATENTS: torch.stack([row[1] for row in rows]),
            NOISE: torch.stack([row[2] for row in rows]),
            TIMES: torch.tensor([row[3] for row in rows], dtype=torch.float32),
            WEIGHTS: torch.tensor([row[4] for row in rows], dtype=torch.float32),
            SOURCES: torch.tensor([row[5] for row in rows], dtype=torch.int64),
        }
        return {name: value.pin_memory() for name, value in found.items()} if micro.input_ids.is_pinned() else found

    def _draws(self, split: Split, step: int, name: Any, number: int) -> Iterator[tuple[tuple[Any, ...], float, float]]:
        """Yield the random key, the time and the weight of each row of a picture."""
        if split == "train":
            key: tuple[Any, ...] = ("train", step, name, number)
            yield key, self.times.training_time(*key), 1.0
            return
        for part in range(EVAL_TIMES):
            key = ("eval", name, number, part)
            yield key, self.times.eval_time(part, *key), 1 / EVAL_TIMES


def make_targets(run: Run, spec: FlowSpec, times: Denoising) -> PictureTargets:
    """The `PictureTargets` of `run`. A collective call."""
    config, (placeholder,) = run.config, run.inputs.processor.drawn_token_ids
    least = run.mesh.grid.size() // run.mesh.dp_size
    dtype = compute_dtype(config.train)
    conditions = Conditions(spec.folder, run.world.device, dtype, max_length=0, seed=config.train.seed)

    def encode(pixels: Tensor) -> Tensor:
        """Encode pictures one by one, so that each has the same latents in any batch."""
        return torch.stack([conditions.encode_pixels(to_bytes(one)).to(dtype).float() for one in pixels])

    if not config.model.encode_target:
        return PictureTargets(placeholder, spec, times, lambda split, name, pixels: encode(pixels), least)
    place = Path(config.train.output_dir or "") / CACHE / _key(run, spec)
    if not is_written(place, run.world):
        _build(run, spec, placeholder, lambda pixels: encode(pixels).to(dtype), place)
    log.info("the latents of pictures are in %s", place)
    cached = Cached(place)

    def latents(split: Split, name: Any, pixels: Tensor) -> Tensor:
        found = cached.latents(split, name, None)
        if found is None:
            raise ValueError(f"model.encode_target: the pictures of sample {name} are not in {place}; delete it")
        return found

    if not config.data.silent_exception:  # otherwise broken pictures have to be found
        run.data.leave_out_drawn()
    return PictureTargets(placeholder, spec, times, latents, least)


def _build(run: Run, spec: FlowSpec, placeholder: int, encode: Callable[[Tensor], Tensor], place: Path) -> None:
    """Write the latents of all pictures to files in the folder `place`; each rank encodes its share. Collective."""
    with writing(place, run.world) as writer:
        for split, micro, names in micro_batches_of(run):
            pixels = iter(micro.extras.get(DRAWN_PIXELS, ()))
            for name, (begin, end) in zip(names, pairwise(micro.cu_seqlens.tolist()), strict=False):
                count = int((micro.input_ids[begin:end] == placeholder).sum()) // spec.tokens
                if count:
                    writer.add({f"{split}/{name}": encode(torch.stack([next(pixels) for _ in range(count)]))})


def _key(run: Run, spec: FlowSpec) -> str:
    """A digest of everything that the latents depend on."""
    vae = spec.folder.parts.get("vae")
    digest = "" if vae is None else f"{weights_digest(vae)} {(vae / 'config.json').read_text(encoding='utf-8')}"
    what = (run.data.digest, digest, spec.side, spec.latents, run.config.train.compute_dtype)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]
