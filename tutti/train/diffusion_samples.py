"""Samples of a diffusion model: the pictures that it draws for prompts before training, at each evaluation, and at the
end.

All ranks draw the same pictures, from noise that depends only on the prompt and the seed, so that pictures of different
steps differ only because of the model. Nothing that training uses is changed. Rank 0 decodes and shows them.

A prompt that is a caption of the data is also a test: of all pictures in the data, is the one nearest to the drawn
picture (by mean squared difference of pixels) one with this caption? Training captions and evaluation captions are
counted separately, as `sample_accuracy` and `unseen_accuracy`. The first measures memorization: a small dataset can be
learned by heart.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tutti.core.compute_dtype import compute_dtype
from tutti.core.keyed_random import generator
from tutti.core.pixels import frame_image, to_data_url
from tutti.data.captions import Extent, captions_of
from tutti.model.conditions import Conditions
from tutti.model.denoiser import Denoiser
from tutti.model.diffusion import Guided, default_side, join_texts, latent_shape, sample
from tutti.model.pipeline_folder import open_folder, read_scheduler
from tutti.parallel.pipeline.executor import Executor
from tutti.train.logging.metrics import Metrics
from tutti.train.run_parts import Run
from tutti.train.samples import prompt_rows
from tutti.train.tasks import Split
from tutti.train.tasks.diffusion import Denoising, text_of

log = logging.getLogger(__name__)

_SHOWN = 12
"""Number of prompts whose pictures are shown; all are counted."""
_SIDE = 96
"""Maximum side in pixels of a picture in the report."""
_COMPARED = 2000
"""Maximum number of training and of evaluation pictures to compare with."""
_SPLITS: tuple[Split, Split] = ("train", "eval")
_AT_ONCE = 32
"""Number of prompts drawn in one batch."""


class Originals(NamedTuple):
    """The data's pictures that have the size of the drawn ones: their pixels fp32 [N, values], and their captions."""

    pixels: Tensor
    captions: tuple[frozenset[str], ...]
    known: frozenset[str]
    unseen: frozenset[str]


class DiffusionSamples:
    """The prompts of train.sample_prompts and train.sample_prompts_path, and the pictures that the model draws for
    them.

    ValueError: the file does not exist, or a row has no text under "prompt".
    """

    def __init__(self, run: Run) -> None:
        self._run, config = run, run.config
        self._prompts = read_prompts(config)
        self._shown = -1
        self._originals: Originals | None = None
        if self._prompts:
            self._folder = open_folder(config)
            self._scheduler = read_scheduler(self._folder)

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        """Draw the prompts after `step`, at most once per step, and show the pictures in the log, the report and the
        trackers. A collective call."""
        if not self._prompts or step == self._shown:
            return
        self._shown = step
        run, train = self._run, self._run.config.train
        extent = self._extent()
        drawn = torch.cat([self._draw(part, extent) for part in _cut(self._prompts)])
        if not run.world.is_main:
            return
        conditions = Conditions(
            self._folder,
            run.world.device,
            compute_dtype(train),
            max_length=run.config.data.max_seq_len,
            seed=train.seed,
        )
        pixels = [conditions.decode(latents) for latents in drawn]
        self._originals = self._originals or self._find_originals(extent)
        rights = [self._is_right(prompt, found) for prompt, found in zip(self._prompts, pixels, strict=True)]
        for prompt, found, right in list(zip(self._prompts, pixels, rights, strict=True))[:_SHOWN]:
            metrics.log_text(step, prompt, "", right, [to_data_url(frame_image(found), _SIDE)])
        self._count(step, metrics, rights)

    def _draw(self, prompts: Sequence[str], extent: Extent) -> Tensor:
        """The latents that the model draws for `prompts`, on the host. A collective call."""
        run, train = self._run, self._run.config.train
        objective, device = run.placed.objective, run.world.device
        task, model = objective.task, objective.model
        assert isinstance(model, Denoiser) and isinstance(task, Denoising)
        store = task.held["store"]
        text, empty = (
            text_of(join_texts([store.text(caption) for caption in captions], task.text_multiple)).map(
                lambda part: part.to(device)
            )
            for captions in (prompts, [""] * len(prompts))
        )
        shape = latent_shape(model.family, model.net.config, run.inputs.processor.grid, extent)
        noise = torch.stack([torch.randn(shape, generator=generator(train.seed, "sample", one)) for one in prompts])
        settings = Guided(train.sample_steps, train.sample_guidance)

        def compute(model: Any, batch: Any) -> Tensor:
            return sample(model.family, model.net, self._scheduler, text, empty, noise.to(device), settings)

        objective.eval()
        with torch.no_grad():
            found: Tensor = objective(None, compute=compute)
        objective.train()
        return found.cpu()

    def _extent(self) -> Extent:
        """The size to draw: that of the first picture of the data, or for streamed data the default of the model's
        config."""
        encoder = self._run.inputs.processor
        first = self._run.data.read([0])
        if first is not None:
            return encoder.extent(first[0].media[0])
        net: Any = self._run.placed.model.net
        side = default_side(net.config, encoder.grid)
        return Extent(side, side)

    def _find_originals(self, extent: Extent) -> Originals:
        encoder, data = self._run.inputs.processor, self._run.data
        pixels, captions = [], []
        named: list[set[str]] = [set(), set()]
        for number, split in enumerate(_SPLITS):
            for item in data.read(range(min(data.size(split), _COMPARED)), split) or ():
                found = captions_of(item.input_ids)
                named[number] |= set(found)
                if encoder.extent(item.media[0]) == extent:
                    pixels.append(encoder.pixels(item.media[0]).float().flatten())
                    captions.append(frozenset(found))
        known, unseen = frozenset(named[0]), frozenset(named[1] - named[0])
        return Originals(torch.stack(pixels) if pixels else torch.empty(0), tuple(captions), known, unseen)

    def _is_right(self, prompt: str, drawn: Tensor) -> bool | None:
        """True if the nearest picture has the caption `prompt`; None if no picture has it."""
        originals = self._originals
        assert originals is not None
        if not any(prompt in captions for captions in originals.captions):
            return None
        apart = (originals.pixels - drawn.float().flatten()).square().mean(1)
        return prompt in originals.captions[int(apart.argmin())]

    def _count(self, step: int, metrics: Metrics, rights: Sequence[bool | None]) -> None:
        originals = self._originals
        assert originals is not None
        known, unseen = (
            [right for prompt, right in zip(self._prompts, rights, strict=True) if right is not None and prompt in of]
            for of in (originals.known, originals.unseen)
        )
        record: dict[str, Any] = {"step": step}
        for name, found in (("sample", known), ("unseen", unseen)):
            if found:
                record |= {f"{name}_accuracy": sum(found) / len(found), f"{name}_answers": len(found)}
        if len(record) > 1:
            log.info(
                "step %d: the nearest picture is the right one for %d of %d known captions, and %d of %d unseen ones",
                *(step, sum(known), len(known), sum(unseen), len(unseen)),
            )
            metrics.log_eval(record)


def read_prompts(config: Any) -> list[str]:
    """The prompts of train.sample_prompts and train.sample_prompts_path, each once."""
    prompts: dict[str, None] = {}
    for place, row, _ in prompt_rows(config):
        text = row.get("prompt")
        if not isinstance(text, str):
            raise ValueError(f'{place}: has no text under "prompt"')
        prompts[text] = None
    return list(prompts)


def _cut(prompts: Sequence[str]) -> Iterator[Sequence[str]]:
    yield from (prompts[start : start + _AT_ONCE] for start in range(0, len(prompts), _AT_ONCE))
