"""Reconstruction: an autoencoder compresses images and is trained on the difference between image and reconstruction.

The loss of an image is a weighted sum (train.loss_weights) of means over its values: absolute error, squared error, and

- for a VQModel `commitment`: the squared distance between the encoder's output and the chosen code, which pulls the
  code (and, more weakly, the encoder) towards the other. Gradients pass straight through the choice of a code. Codes
  that are unused for `RESTART` steps are moved to encoder outputs of that step.
- for an AutoencoderKL `kl`: the KL divergence of the latents' distribution from a standard normal one.

Losses are summed over the images of the global batch on all ranks and divided by their number, which is known
beforehand. All random numbers (image variation, latent noise, new codes) depend only on the seed, the epoch and the
sample, so that they are the same on every layout.

Shapes: N images, K codes, D their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import Batch, GlobalBatch
from tutti.core.dist import World
from tutti.core.keyed_random import generator
from tutti.core.pixels import to_data_url, to_image
from tutti.core.tensors import local_part
from tutti.data.augment import Augment, warp
from tutti.data.images import PIXELS
from tutti.model.autoencoder import Autoencoder, AutoencoderConfig, flops_per_value, load_autoencoder_config
from tutti.model.initialize import own_part
from tutti.train.tasks import Prepare, SampleDisplay, Split, Sums, WholeModelTask, Work

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.logging.metrics import Metrics
    from tutti.train.run_parts import Run

RESTART = 20
"""Steps after which unused codes are replaced; also done once after the first step."""

_CANDIDATES = 8
"""Positions of an image that are candidates for new codes."""

_SHOWN, _SHOWN_SIDE = 8, 64
"""Number of images in the report, and their maximum side in pixels."""


@dataclass(frozen=True)
class Reconstructing(WholeModelTask):
    """Sums over images. weights: of the losses, by kind. codes: K; 0 without a codebook."""

    weights: Mapping[str, float] = field(default_factory=dict)
    codes: int = 0
    augment: Augment = field(default_factory=Augment)
    seed: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the model's losses."""
        return ("l1", "mse", "commitment" if self.codes else "kl")

    def sizes(self) -> dict[str, int]:
        usage = {"usage": self.codes} if self.codes else {}
        return {**super().sizes(), **dict.fromkeys(self.kinds, 1), **usage}

    def flop_counter(self, model: Autoencoder) -> Work:
        each = flops_per_value(model)
        return lambda micro: each * micro.num_values()

    def run(self, model: Autoencoder, batch: Batch) -> Sums:
        pixels, share = _pixels(model, batch)
        if "maps" in batch.payload:
            pixels = warp(pixels, batch.payload["maps"])
        made = model(pixels, batch.payload.get("noise"))
        losses: Any = sum(self.weights[kind] * made.terms[kind] for kind in self.kinds)
        sums = {kind: made.terms[kind].detach().sum() * share for kind in self.kinds}
        sums["loss"] = losses.sum() * share
        if made.codes is not None:
            used = made.codes.flatten().bincount(minlength=self.codes) * share
            sums["usage"] = used
            if model.training:
                model.seen.append(Seen.of(made.codes, made.encoded, batch, used))
        sources = batch.segment_sources[batch.target_segment]
        return sums | (self.by_source(losses.detach(), sources) if share else {})

    def metrics(self, sums: Mapping[str, Any], num_targets: int) -> dict[str, float]:
        found = {f"loss/{kind}": sums[kind] / num_targets for kind in self.kinds}
        if self.codes:
            found["codes_used"] = sum(count > 0 for count in sums["usage"])
        return found

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        model: Any = run.placed.model
        shape = model.map_shape()

        def with_draws(batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
            return (self._drawn(batch, shape) if split == "train" else batch for batch in batches)

        return with_draws

    def _drawn(self, batch: GlobalBatch, shape: tuple[int, int, int]) -> GlobalBatch:
        """The batch with its random numbers."""

        def complete(micro: Batch, names: tuple[Any, ...]) -> Batch:
            names = tuple(names[place] for place in micro.target_index.tolist())
            if not names:
                return micro
            payload: dict[str, Tensor] = {}
            if self.augment:
                payload["maps"] = self.augment.maps(self.seed, batch.epoch, names)

            def draw(make: Any, size: tuple[int, ...], purpose: str) -> Tensor:
                draws = (generator(self.seed, batch.epoch, name, purpose) for name in names)
                return torch.stack([make(size, generator=each) for each in draws])

            if not self.codes:
                payload["noise"] = draw(torch.randn, shape, "posterior")
            elif _restarts(batch.step):
                payload["places"] = draw(torch.rand, (2, _CANDIDATES), "restart")
            if micro.input_ids.is_pinned():
                payload = {name: value.pin_memory() for name, value in payload.items()}
            return replace(micro, payload={**micro.payload, **payload})

        return replace(batch, micro_batches=tuple(map(complete, batch.micro_batches, batch.names)))

    def after_step(self, model: Autoencoder, batch: GlobalBatch, world: World) -> None:
        if not self.codes:
            return
        seen, model.seen = model.seen, []
        used = torch.stack([one.used for one in seen]).sum(0)
        if world.size > 1:
            dist.all_reduce(used)
        model.usage += used.to(model.usage.dtype)
        if not _restarts(batch.step):
            return
        mine = [one.candidates.cpu() for one in seen if one.candidates is not None]
        found = torch.cat([part for parts in world.gather(mine) for part in parts])
        restart_codes(model, found[found[:, 0].argsort(), 1:])

    def make_samples(self, run: Run) -> SampleDisplay:
        return Reconstructions(run)


@dataclass(frozen=True)
class Seen:
    """Statistics of a micro batch: how often each code was `used` [K], and, if unused codes are to be replaced,
    candidate vectors [n, 1 + D], each preceded by its rank in the order of all candidates."""

    used: Tensor
    candidates: Tensor | None

    @classmethod
    def of(cls, codes: Tensor, encoded: Tensor | None, batch: Batch, used: Tensor) -> Seen:
        draws = batch.payload.get("places")
        if draws is None or encoded is None:
            return cls(used, None)
        places = (draws[:, 0] * codes.shape[1]).long()
        vectors = encoded.detach().float().gather(1, places[..., None].expand(-1, -1, encoded.shape[-1]))
        return cls(used, torch.cat([draws[:, 1, :, None], vectors], dim=-1).flatten(0, 1))


def _restarts(step: int) -> bool:
    return step == 1 or step % RESTART == 0


def _pixels(model: Autoencoder, batch: Batch) -> tuple[Tensor, float]:
    """The images of a batch, and 1; for a batch without images a gray one, and 0, so that all ranks run the model."""
    if PIXELS in batch.extras:
        return batch.extras[PIXELS], 1.0
    side = model.config.side
    return torch.zeros(1, 3, side, side, device=batch.input_ids.device), 0.0


@torch.no_grad()
def restart_codes(model: Autoencoder, candidates: Tensor) -> None:
    """Move unused codes to the first of `candidates` [n, D], as many as there are, and restart the usage counts."""
    weight = model.net.quantize.embedding.weight
    unused = (model.usage == 0).nonzero().flatten().cpu()[: len(candidates)]
    full = torch.zeros(weight.shape)
    full[unused] = candidates[: len(unused)]
    changed = torch.zeros(weight.shape, dtype=torch.bool)
    changed[unused] = True
    local = local_part(weight)
    new = own_part(full, weight).to(local)
    local.copy_(torch.where(own_part(changed, weight).to(local.device), new, local))
    model.usage.zero_()


class Reconstructions:
    """Shows images of the evaluation data (or training data) above their reconstructions in the report, once per
    evaluation."""

    def __init__(self, run: Run) -> None:
        self._run, self._shown = run, -1
        self._batch: Batch | None = None

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        if step == self._shown:
            return
        self._shown, data = step, self._run.data
        if self._batch is None:
            batches = data.evaluate() if data.evaluation_sources else data.scan()
            self._batch = next(batches).micro_batches[0]
            batches.close()  # type: ignore[attr-defined]
        objective = self._run.placed.objective
        objective.eval()
        with torch.no_grad():
            (pairs,) = executor.evaluate([self._batch], compute=_reconstruct)
        objective.train()
        pictures = [_above(*(to_image(pixels) for pixels in pair)) for pair in zip(*pairs, strict=True)]
        if pictures:
            metrics.log_text(step, "images, above what is made of them", "", None, pictures)


def _reconstruct(model: Autoencoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """The first images of a batch, and their reconstructions."""
    pixels, share = _pixels(model, batch)
    made = model(pixels[:_SHOWN]).pixels
    return (pixels[:_SHOWN], made) if share else (pixels[:0], made[:0])


def _above(first: Image.Image, second: Image.Image) -> str:
    """One image above the other, as a data URL."""
    both = Image.new("RGB", (first.width, 2 * first.height))
    both.paste(first, (0, 0))
    both.paste(second, (0, first.height))
    return to_data_url(both, 2 * _SHOWN_SIDE)


def make_task(config: Config) -> Reconstructing:
    found: AutoencoderConfig = load_autoencoder_config(config)
    weights = {**config.data.task.losses, **config.train.loss_weights}
    return Reconstructing(
        weights=weights,
        codes=found.num_codes,
        augment=Augment.read(config.data.augment),
        seed=config.train.seed,
    )
