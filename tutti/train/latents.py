"""Latents, caption embeddings and noise for the micro batches of diffusion training.

The frozen parts (autoencoder, text encoders) run outside the training step. With train.cache_latents, and data that is
not streamed, they run once before training: each rank encodes its share of all pictures and captions into files below
`output_dir/cache/KEY`, where KEY is a digest of the data, the encoders' weights and the relevant settings. Then the
encoders are freed, and pictures are no longer decoded. The files contain tensors by name, which are read one at a time.
A run that finds the folder complete encodes nothing. Without the cache, each micro batch is encoded when it is needed.
In both cases pictures and captions are encoded one by one, so that the numbers are the same.

Each micro batch then gets a payload: latents, noise, times, caption embeddings, and a weight per sample. A rank without
samples in a step gets one of weight 0, so that it runs the model like the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tutti.checkpoint.hf_files import weights_digest
from tutti.core.batch import Batch, GlobalBatch
from tutti.core.compute_dtype import compute_dtype
from tutti.core.dist import World
from tutti.core.files import replace_file
from tutti.core.keyed_random import generator
from tutti.data.captions import PIXELS, captions_of
from tutti.model.conditions import Conditions
from tutti.model.denoiser import Denoiser
from tutti.model.diffusion import EncodedText, join_texts, latent_channels
from tutti.model.pipeline_folder import PipelineFolder, open_folder
from tutti.train.run_parts import Run
from tutti.train.tasks import Split
from tutti.train.tasks.diffusion import EVAL_TIMES, LATENTS, NOISE, SOURCES, TEXT, TIMES, WEIGHTS, Denoising

log = logging.getLogger(__name__)

CACHE = "cache"
_COMPLETE = "complete.json"
_FILE_BYTES = 2**28
"""Bytes of tensors to collect before writing them to a file."""


class Store(Protocol):
    """A source of latents and caption embeddings."""

    def latents(self, split: Split, name: Any, pixels: Tensor | None) -> Tensor | None:
        """The latents of a sample, looked up by name or computed from its pixels; None if its picture is broken."""
        ...

    def text(self, caption: str) -> EncodedText:
        """The embedding of a caption, without a batch dimension."""
        ...


@dataclass(frozen=True)
class Live:
    """Encodes on demand; remembers captions."""

    conditions: Conditions
    texts: dict[str, EncodedText]
    dtype: torch.dtype

    def latents(self, split: Split, name: Any, pixels: Tensor | None) -> Tensor | None:
        return None if pixels is None else self.conditions.encode_pixels(pixels).to(self.dtype).float()

    def text(self, caption: str) -> EncodedText:
        if caption not in self.texts:
            if len(self.texts) >= 4096:
                self.texts.clear()
            self.texts[caption] = self.conditions.encode_text(caption)
        return self.texts[caption]


class Cached:
    """Reads tensors by name from the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def _get(self, name: str) -> Tensor | None:
        file = self._files.get(name)
        return None if file is None else file.get_tensor(name)

    def latents(self, split: Split, name: Any, pixels: Tensor | None) -> Tensor | None:
        found = self._get(f"{split}/{name}")
        return None if found is None else found.float()

    def text(self, caption: str) -> EncodedText:
        parts = [self._get(f"{part}/{_short(caption)}") for part in TEXT]
        if parts[0] is None:
            raise ValueError(f"train.cache_latents: the caption {caption!r} is not in the cache")
        return EncodedText(*parts)  # type: ignore[arg-type]


def _short(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Latents:
    """Adds the payload to global batches. smallest: the shape of the smallest latents."""

    store: Store
    task: Denoising
    smallest: tuple[int, ...]

    def __call__(self, batches: Iterable[GlobalBatch], split: Split) -> Iterator[GlobalBatch]:
        for batch in batches:
            pairs = zip(batch.micro_batches, batch.names, strict=True)
            yield replace(batch, micro_batches=tuple(self._complete(*pair, batch, split) for pair in pairs))

    def _complete(self, micro: Batch, names: Sequence[Any], batch: GlobalBatch, split: Split) -> Batch:
        rows: list[dict[str, Any]] = []
        trained = set(micro.target_segment.tolist())
        for place, (name, ids) in enumerate(zip(names, _segments(micro), strict=True)):
            pixels = micro.extras[PIXELS][place] if PIXELS in micro.extras and place in trained else None
            found = self.store.latents(split, name, pixels) if place in trained else None
            if found is not None:
                source = int(micro.segment_sources[place])
                rows += self._rows(found, captions_of(ids), source, name, batch.step, split)
        payload = _joined(rows or [self._nothing()], self.task.text_multiple)
        if micro.input_ids.is_pinned():
            payload = {name: value.pin_memory() for name, value in payload.items()}
        # Pixels are no longer needed; only latents go to the device.
        return replace(micro, extras={}, payload={**micro.payload, **payload})

    def _rows(
        self, latents: Tensor, captions: Sequence[str], source: int, name: Any, step: int, split: Split
    ) -> list[dict[str, Any]]:
        """The rows of a sample: one in training, several in evaluation."""
        task = self.task
        if split == "eval":
            keys: list[tuple[Any, ...]] = [("eval", name, part) for part in range(EVAL_TIMES)]
            times = [task.eval_time(part, *key) for part, key in enumerate(keys)]
            caption = captions[0]
        else:
            key = ("train", step, name)
            keys, times = [key], [task.training_time(*key)]
            caption = captions[_drawn(task.seed, len(captions), *key)]
            dropped = torch.rand((), generator=generator(task.seed, *key, "dropout")).item() < task.dropout
            caption = "" if dropped else caption
        text = self.store.text(caption)
        return [
            {
                LATENTS: latents,
                NOISE: torch.randn(latents.shape, generator=generator(task.seed, *key, "noise")),
                TIMES: time,
                WEIGHTS: 1 / len(keys),
                SOURCES: source,
                "text": text,
            }
            for key, time in zip(keys, times, strict=True)
        ]

    def _nothing(self) -> dict[str, Any]:
        blank = torch.zeros(self.smallest)
        return {LATENTS: blank, NOISE: blank, TIMES: 0.5, WEIGHTS: 0.0, SOURCES: 0, "text": self.store.text("")}


def _drawn(seed: int, count: int, *key: object) -> int:
    """A random number below `count`, determined by seed and key."""
    return int(torch.randint(count, (), generator=generator(seed, *key, "caption"))) if count > 1 else 0


def _segments(micro: Batch) -> Iterator[Any]:
    """Yield the tokens of each sample of a micro batch, int64 [n]."""
    borders, ids = micro.cu_seqlens.tolist(), micro.input_ids.numpy()
    for begin, end in islice(pairwise(borders), micro.num_sequences):  # padding comes last
        yield ids[begin:end]


def _joined(rows: Sequence[Mapping[str, Any]], multiple: int) -> dict[str, Tensor]:
    """Join rows to a payload. multiple: pad captions to a multiple of this length."""
    return {
        **{name: torch.stack([row[name] for row in rows]) for name in (LATENTS, NOISE)},
        **{name: torch.tensor([row[name] for row in rows], dtype=torch.float32) for name in (TIMES, WEIGHTS)},
        SOURCES: torch.tensor([row[SOURCES] for row in rows]),
        **join_texts([row["text"] for row in rows], multiple),
    }


def make_latents(run: Run, task: Denoising) -> Latents:
    """The `Latents` of `run`. A collective call."""
    config, world = run.config, run.world
    folder = open_folder(config)
    conditions = Conditions(
        folder,
        world.device,
        compute_dtype(config.train),
        max_length=config.data.max_seq_len,
        seed=config.train.seed,
    )
    encoder, model, side = run.inputs.processor, run.placed.model, run.inputs.processor.grid.patch
    assert isinstance(model, Denoiser)
    smallest = (latent_channels(model.family, model.net.config), *([1] if model.family.video else []), side, side)
    if not config.train.cache_latents or run.data.digest is None:
        reason = "train.cache_latents is off" if run.data.digest is not None else "the data is streamed"
        log.info("latents and captions are encoded in each step, since %s", reason)
        return _latents(Live(conditions, {}, task.dtype), task, smallest)
    place = Path(config.train.output_dir or "") / CACHE / _key(run, folder)
    done = is_written(place, world)
    if not done:
        _build(run, conditions, place, task.dtype)
    encoder.decodes = False
    log.info("latents and captions: %s %s; their encoders leave memory", "taken from" if done else "kept in", place)
    return _latents(Cached(place), task, smallest)


def _latents(store: Store, task: Denoising, smallest: tuple[int, ...]) -> Latents:
    """`Latents` that read from `store`. ValueError: the task's ranks cannot share the captions."""
    length = len(store.text("").embeds)
    if task.text_multiple == 1 and length % task.ranks:  # a family without a text mask, whose captions cannot be padded
        raise ValueError(
            f"train.ulysses_parallel_size: {task.ranks} does not divide the {length} tokens that captions have; with a "
            "language model as text_encoder these are data.max_seq_len"
        )
    task.held["store"] = store
    return Latents(store, task, smallest)


def _build(run: Run, conditions: Conditions, place: Path, dtype: torch.dtype) -> None:
    """Encode all pictures and captions into files in the folder `place`. A collective call."""
    world = run.world
    captions: dict[str, None] = dict.fromkeys(["", *run.config.train.sample_prompts])
    with writing(place, world) as writer:
        for split, micro, names in micro_batches_of(run):
            trained = set(micro.target_segment.tolist())
            for number, (name, ids) in enumerate(zip(names, _segments(micro), strict=True)):
                if number in trained:
                    latents = conditions.encode_pixels(micro.extras[PIXELS][number])
                    writer.add({f"{split}/{name}": latents.to(dtype)})
                    captions |= dict.fromkeys(captions_of(ids))
        every = dict.fromkeys(caption for found in world.gather(list(captions)) for caption in found)
        for caption in list(every)[world.rank :: world.size]:
            text = conditions.encode_text(caption)
            parts = zip(TEXT, text, strict=True)
            writer.add({f"{part}/{_short(caption)}": value for part, value in parts if value is not None})


def micro_batches_of(run: Run) -> Iterator[tuple[Split, Batch, tuple[Any, ...]]]:
    """Yield this rank's micro batches of one pass over all data, each with its split and the names of its samples."""
    splits: dict[Split, Iterable[GlobalBatch]] = {"train": run.data.scan()}
    if run.data.evaluation_sources:
        splits["eval"] = run.data.evaluate()
    for split, batches in splits.items():
        for batch in batches:
            for micro, names in zip(batch.micro_batches, batch.names, strict=True):
                yield split, micro, names


def is_written(place: Path, world: World) -> bool:
    """True if the folder `place` was completed by `writing`. Collective."""
    return world.broadcast((place / _COMPLETE).is_file() if world.is_main else None)


@contextmanager
def writing(place: Path, world: World) -> Iterator[TensorWriter]:
    """A writer of this rank's tensors to files in the folder `place`, which is emptied first and marked complete once
    every rank has left the context. Collective."""

    def begin() -> None:
        if world.is_main:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)

    world.run_on_all_ranks(begin)
    writer = TensorWriter(place, world.rank)
    yield writer
    writer.flush()
    world.barrier()  # wait until all files are written
    if world.is_main:
        replace_file(place / _COMPLETE, json.dumps({"ranks": world.size}) + "\n")
    world.barrier()


class TensorWriter:
    """Writes this rank's tensors to files of limited size."""

    def __init__(self, place: Path, rank: int) -> None:
        self._place, self._rank, self._number = place, rank, 0
        self._held: dict[str, Tensor] = {}
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        self._held |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._bytes > _FILE_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._held:
            save_file(self._held, self._place / f"{self._rank:04d}-{self._number:05d}.safetensors")
            self._held, self._bytes, self._number = {}, 0, self._number + 1


def _key(run: Run, folder: PipelineFolder) -> str:
    """A digest of everything that the cache depends on."""
    config = run.config
    encoders = {name: path for name, path in folder.parts.items() if name.startswith(("vae", "text_", "tokenizer"))}
    parts = {name: _digest(path) for name, path in encoders.items()}
    limits = [getattr(config.data, name) for name in dir(config.data) if name.startswith(("image_", "video_"))]
    what = (
        run.data.digest,
        parts,
        folder.class_name,
        config.data.max_seq_len,
        limits,
        sorted(config.train.sample_prompts),
        config.train.compute_dtype,
        config.train.seed,
    )
    return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def _digest(path: Path) -> str:
    config = "".join(file.read_text(encoding="utf-8") for file in sorted(path.glob("*.json")))
    return hashlib.sha256(f"{weights_digest(path)} {config}".encode()).hexdigest()
