"""Diffusion: a transformer learns to denoise pictures, given their captions.

The loss of a sample is the mean squared error of the model's prediction over the values of its latents
(`tutti.model.diffusion`). It is summed over samples and divided by the number of samples in the global batch. In
training each sample has one time: logit-normal (train.flow_time_mean, train.flow_time_std) and shifted
(train.flow_shift) as for flow matching, also for an eps model. In evaluation it has `EVAL_TIMES`, one in each of
equally many quantiles of that distribution. With probability train.cfg_dropout a training sample's caption is replaced
by the empty one, which classifier-free guidance needs later.

All random numbers (time, noise, which of several captions, caption dropout) depend only on the seed, the step and the
sample, so that they are the same on every layout.

Shapes: B samples of a micro batch, C channels of latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import Batch
from tutti.core.compute_dtype import compute_dtype
from tutti.core.keyed_random import generator
from tutti.model.denoiser import Denoiser
from tutti.model.denoiser_flops import DenoiserFlops
from tutti.model.diffusion import EncodedText, add_noise, flow_time, predict, squared_errors
from tutti.model.pipeline_folder import PipelineFolder, open_folder, read_scheduler
from tutti.train.tasks import Prepare, SampleDisplay, Sums, WholeModelTask, Work

if TYPE_CHECKING:
    from tutti.parallel.pipeline.executor import Executor
    from tutti.train.run_parts import Run

EVAL_TIMES = 4
"""Number of times at which a sample is evaluated."""

LATENTS, NOISE, TIMES, WEIGHTS, SOURCES = "latents", "noise", "times", "weights", "sources"
TEXT = ("embeds", "mask", "pooled")
"""The names of a micro batch's payload."""


@dataclass(frozen=True)
class Denoising(WholeModelTask):
    """Sums over samples.

    ranks: the number of ranks that share a micro batch and all compute its loss, each with gradients of its own tokens.
    text_multiple: captions are padded to a multiple of this length. scheduler: for the noise table of an eps model.
    held: the `store` of latents and captions, after `prepare`.
    """

    seed: int = 0
    dtype: torch.dtype = torch.float32
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    dropout: float = 0.0
    ranks: int = 1
    text_multiple: int = 1
    scheduler: Any = field(default=None, compare=False, repr=False)
    held: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, config: Config, folder: PipelineFolder | None) -> Denoising:
        """The task as configured, for the model in `folder`."""
        train = config.train
        return cls(
            seed=train.seed,
            dtype=compute_dtype(train),
            mean=train.flow_time_mean,
            std=train.flow_time_std,
            shift=train.flow_shift,
            dropout=train.cfg_dropout,
            scheduler=read_scheduler(folder) if folder and folder.family.prediction == "eps" else None,
        )

    def run(self, model: Denoiser, batch: Batch) -> Sums:
        given = batch.payload
        text = text_of(given).map(lambda part: part.to(self.dtype) if part.is_floating_point() else part)
        noised = add_noise(model.family, self.scheduler, given[LATENTS], given[NOISE], given[TIMES])
        found = predict(model.family, model.net, noised.latents.to(self.dtype), noised.times, text)
        losses = squared_errors(found, noised.target) * given[WEIGHTS]
        own = losses.sum()
        # Ranks that share tokens all compute the whole loss, and each has the gradients of its own tokens.
        loss = own - own.detach() * (1 - 1 / self.ranks)
        return {"loss": loss, **self.by_source(losses.detach() / self.ranks, given[SOURCES])}

    def flop_counter(self, model: Denoiser) -> Work:
        count = DenoiserFlops(model.config.net, model.net.parameters())

        def work(micro: Batch) -> float:
            text = text_of(micro.payload)
            pooled = None if text.pooled is None else text.pooled.shape[-1]
            length, width = text.embeds.shape[1:]
            return count(micro.payload[LATENTS].shape, length, width, pooled)

        return work

    def prepare(self, run: Run, executor: Executor) -> Prepare:
        from tutti.train.latents import make_latents  # which looks at runs, and so imports the tasks

        return make_latents(run, self)

    def make_samples(self, run: Run) -> SampleDisplay:
        from tutti.train.diffusion_samples import DiffusionSamples

        return DiffusionSamples(run)

    def training_time(self, *key: object) -> float:
        """The time in (0, 1) of the training sample with this random key."""
        drawn = torch.rand((), dtype=torch.float64, generator=generator(self.seed, *key, "time")).item()
        return self.time_at(drawn)

    def eval_time(self, part: int, *key: object) -> float:
        """The time in (0, 1), within one of the EVAL_TIMES quantiles, of the evaluation sample with this random key."""
        drawn = torch.rand((), dtype=torch.float64, generator=generator(self.seed, *key, "time")).item()
        return self.time_at((part + drawn) / EVAL_TIMES)

    def time_at(self, uniform: float) -> float:
        """The quantile function of the times: the time below which a share `uniform` of all times lies."""
        uniform = min(max(uniform, 1e-9), 1 - 1e-9)
        return uniform if self.scheduler is not None else flow_time(uniform, self.mean, self.std, self.shift)


def text_of(payload: Mapping[str, Tensor]) -> EncodedText:
    """The caption embeddings in a payload."""
    return EncodedText(*(payload.get(name) for name in TEXT))  # type: ignore[arg-type]


def make_task(config: Config) -> Denoising:
    ranks, folder = config.train.ulysses_parallel_size, open_folder(config)
    return replace(Denoising.of(config, folder), ranks=ranks, text_multiple=ranks if folder.family.mask else 1)
