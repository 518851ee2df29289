"""`tutti infer`: answers prompts from the command line, the rows of a file, or a chat.

Every rank of the job loads its part of the model (`tutti.infer.load`). Only rank 0 reads the terminal and writes.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from tutti.checkpoint.hub import with_local_paths
from tutti.config import Config
from tutti.core.device import keep_freed_memory, limit_threads, pick_device
from tutti.core.dist import World, init_world, shutdown_world
from tutti.core.log import setup_logging
from tutti.data.media_places import Entry
from tutti.data.rows import RowError
from tutti.infer.batch import answer_rows, read_rows
from tutti.infer.chat import chat
from tutti.infer.diffusion import DiffusionSource, draw, find_denoiser
from tutti.infer.drawing import PictureCollector
from tutti.infer.generate import Generator, Request
from tutti.infer.load import LoadedModel, load_model
from tutti.infer.model_source import find_source, named_as_infer
from tutti.infer.prompts import prompt_request, to_draw
from tutti.infer.sampling import Sampler
from tutti.infer.stream import Edges, TextStream

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InferenceJob:
    """A job: answer `prompts`, or the rows of `input` into `output`; with neither, chat. For a diffusion model, draw
    the prompts into the folder `output`.

    media: kinds and files of media to put before each prompt, or the first message. draw: answers begin with an image.
    """

    prompts: tuple[str, ...] = ()
    input: str | None = None
    output: str | None = None
    media: tuple[Entry, ...] = ()
    draw: bool = False


def infer(config: Config, job: InferenceJob) -> None:
    """Do `job` with the model of `config.infer`, on this rank; every rank of the job calls it.

    ValueError and OSError, on every rank: a mistake that the user can fix.
    """
    rank, local_world = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    setup_logging(rank)
    limit_threads(local_world)
    keep_freed_memory()
    world = init_world(pick_device("cpu"))
    try:
        with named_as_infer():
            config = with_local_paths(config, world)
        denoiser = find_denoiser(config, world)
        if denoiser is not None:
            _draw(config, denoiser, job, world)
            return
        if job.output and not job.input:
            find_source(config, world)  # reports if there is no model
            raise ValueError(
                "--output: goes with --input, or with a diffusion model, which draws; this one writes text"
            )
        rows = world.run_on_all_ranks(lambda: read_rows(Path(job.input)) if job.input else {})
        loaded = load_model(config, world)
        sampler = Sampler.of(config.infer)
        generator = Generator(loaded.logits, sampler, loaded.stop_ids, world, config.infer.batch_tokens)
        generator = replace(generator, drawing=loaded.drawing)
        if config.infer.stop:
            ends = Edges(stops=config.infer.stop)
            generator = replace(generator, make_text=lambda: TextStream(loaded.form.tokenizer, ends))
        if job.input and job.output:
            answer_rows(config, loaded, generator, rows, Path(job.input), Path(job.output), draw=job.draw)
        elif job.prompts:
            _answer_prompts(config, loaded, generator, job)
        else:
            chat(config, loaded, generator, job.media)
    finally:
        shutdown_world()


def _draw(config: Config, denoiser: DiffusionSource, job: InferenceJob, world: World) -> None:
    """Draw the prompts of `job`. ValueError: the job is another one."""
    if job.input or job.media or not job.prompts or not job.output:
        raise ValueError("infer.model_path is a diffusion model, which draws: give --prompt TEXT ... --output FOLDER")
    draw(config, denoiser, job.prompts, Path(job.output), world)


def _answer_prompts(config: Config, loaded: LoadedModel, generator: Generator, job: InferenceJob) -> None:
    """Print the answers in the order of the prompts as they are generated, each under its prompt if there are
    several."""
    prompts = job.prompts
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        try:
            request = prompt_request(loaded.form, prompt, number, config.infer.max_tokens, job.media)
            requests.append(to_draw(loaded.form, request) if job.draw else request)
        except RowError as error:
            raise ValueError(f"--prompt {number + 1}: {error}") from None
    streams = [TextStream(loaded.form.tokenizer, item.edges) for item in requests]
    waiting: list[list[str]] = [[] for _ in prompts]
    ended = [False] * len(prompts)
    current = 0
    show = _show if generator.world.is_main else _hide
    show(_heading(prompts, 0))

    def keep(number: int, place: int, picture: Image.Image) -> None:
        file = Path(f"picture_{number + 1}_{place}.png")
        if generator.world.is_main:
            picture.save(file)
        waiting[number].append(f"[{file}]")

    for token in PictureCollector(generator.drawing, keep).watch(generator.stream(requests)):
        stream = streams[token.number]
        if token.end != "stop":
            waiting[token.number].append(stream.add(token.id))
        if token.end:
            ended[token.number] = True
            waiting[token.number].append(stream.end())
        while current < len(prompts):
            show("".join(waiting[current]))
            waiting[current].clear()
            if not ended[current]:
                break
            current += 1
            show("\n" + (_heading(prompts, current) if current < len(prompts) else ""))


def _heading(prompts: Sequence[str], number: int) -> str:
    if len(prompts) == 1:
        return ""
    between = "\n" if number else ""
    return f"{between}> {prompts[number]}\n"


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _hide(text: str) -> None:
    pass
