"""Samples: the model's answers to prompts before training, at each evaluation, and at the end.

The model answers in its current layout, in the middle of training, with the generation code of `tutti infer` (requests,
stop rule, text, loop). If every rank has the model's full depth and all tokens of a row (a single process, DDP, FSDP),
it uses a key/value cache. On any other layout (tensor, pipeline, context or Ulysses parallelism, compiled blocks,
batch-invariant mode) it runs all rows again for each token, through the executor of training: for a few short answers
this costs less than supporting a cache on every layout.

All ranks run the same prompts. Answers are greedy, use no random numbers, and change nothing that training uses, so
that training is the same bit for bit with and without prompts.

A row of `train.sample_prompts_path` can give under "answer" the text that its answer must contain, or a list of
alternatives. If data.row_template has the assistant draw a row's image, the answer must contain a picture that is
nearer to that image than to any other row's. Such rows are counted: the share of right answers is logged as
`sample_accuracy`, and separately, for rows of a file in data.eval_path (which the model is not trained on), as
`unseen_accuracy`.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from tutti.attention.interface import PACKED, attention_by_part
from tutti.attention.kv_cache import register
from tutti.config import Config
from tutti.core.batch import Media, Sample, pack
from tutti.core.pixels import to_data_url, to_values
from tutti.data.formats import BadRow, JsonLines, Row
from tutti.data.media import MediaFolder, load_image
from tutti.data.media_cache import MediaCache
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import MEDIA_PARTS, RowError
from tutti.data.template import read_template
from tutti.data.video import load_video
from tutti.infer.drawing import Drawing, PictureCollector, drawing_of, hiding
from tutti.infer.flow_painter import FlowPainter, LedLogits
from tutti.infer.generate import CachedLogits, Generator, NextLogits, Request, whole_answers
from tutti.infer.hf_generate import needs_generate
from tutti.infer.media import MediaInputs, as_sample, encoded_once, media_inputs
from tutti.infer.prompts import PromptFormat, conversation_to_answer, filled, is_target, row_request, to_draw
from tutti.infer.sampling import Sampler
from tutti.model.diffusion import Guided
from tutti.model.tokenizer import end_ids
from tutti.model.vq import PictureTokenizer
from tutti.parallel.fsdp import run_as_forward
from tutti.parallel.pipeline.executor import Executor
from tutti.parallel.sequence import sequence_ranks, split_samples, split_tokens
from tutti.train.logging.metrics import Metrics
from tutti.train.objective import logits
from tutti.train.run_parts import Run

log = logging.getLogger(__name__)

_GREEDY = Sampler(greedy=True, temperature=1.0, top_p=1.0, seed=0)
_SHOWN = 8
"""Maximum number of rows with an expected answer whose answers are shown; all are counted."""
_PICTURE_SIDE = 96
"""Maximum side in pixels of a picture in the report."""
_CACHE_BYTES = 2**26
"""Memory for the decoded media of prompts, which are needed again for each token if there is no cache."""
_CACHEABLE = (PACKED, "flash_attention_2", "flash_attention_3")


class _Prompt(NamedTuple):
    """A prompt.

    text: what is shown. expected: texts of which the answer must contain one; empty if any answer will do. pictures:
    its media as data URLs. target: the picture to draw, as the model draws pictures. unseen: it is evaluation data.
    """

    text: str
    request: Request
    expected: tuple[str, ...]
    pictures: tuple[str, ...] = ()
    target: Tensor | None = None
    unseen: bool = False


class Samples:
    """The prompts of train.sample_prompts and train.sample_prompts_path, and the model's answers.

    ValueError: the file does not exist, or a prompt cannot be used.
    """

    def __init__(self, run: Run) -> None:
        self._run, config = run, run.config
        asked = config.train.sample_prompts or config.train.sample_prompts_path
        self._painter = _painter(run) if asked else None
        model, tokenizer = run.placed.model, run.inputs.tokenizer
        self._drawing = drawing_of(model, tokenizer, run.world.device, painter=self._painter) if asked else None
        self._prompts = [] if run.placed.structure.classifies else _read(run, self._drawing)
        self._by_cache = bool(self._prompts) and _fits_cache(run)
        self._media = media_inputs(run.placed.structure, _processor(run))
        self._budget = config.train.micro_batch_size * config.data.max_seq_len
        sizes = [prompt.request.size for prompt in self._prompts]
        # With compilation, rows of equal length need only one compiled program; without it, padding would only cost
        # time.
        room = min(sum(sizes), max([self._budget, *sizes]))
        self._pad_to = room if config.train.enable_compile else None
        self._shown = -1
        if not self._by_cache and any(prompt.request.drawn or prompt.target is not None for prompt in self._prompts):
            raise ValueError("train.sample_prompts_path: pictures are drawn in training by ddp and fsdp alone")

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        """Answer the prompts after `step` (0: before training), at most once per step, in the log, the report and the
        trackers.

        A collective call.
        """
        if not self._prompts or step == self._shown:
            return
        self._shown = step
        objective, requests = self._run.placed.objective, [prompt.request for prompt in self._prompts]
        ends = frozenset(end_ids(self._run.inputs.tokenizer, objective.model.generation_config))
        objective.eval()
        if self._painter is not None:
            self._painter.begin()
        with self._next_logits(executor) as source:
            drawing = self._drawing[0] if self._drawing else None
            drawn = PictureCollector(drawing)
            generator = Generator(source, _GREEDY, ends, self._run.world, self._budget, drawing=drawing)
            tokens = drawn.watch(generator.stream(requests))
            texts = dict(whole_answers(tokens, requests, self._run.inputs.tokenizer))
        objective.train()
        graded: dict[bool, list[bool]] = {False: [], True: []}
        for prompt in self._prompts:
            text = texts[prompt.request.number]
            made = drawn.found.get(prompt.request.number, [])
            right = is_right(text, prompt.expected) if prompt.expected else None
            if prompt.target is not None:
                right = bool(made) and self._nearest(made[0]) is prompt
            if right is not None:
                graded[prompt.unseen].append(right)
            if right is None or len(graded[prompt.unseen]) <= _SHOWN:
                mark = {None: "", True: " (right)", False: " (wrong)"}[right]
                shown = " ".join(prompt.text.split()), " ".join(text.split())
                log.info("step %d, sample: %s -> %s%s", step, *shown, mark)
                pictures = (*prompt.pictures, *(to_data_url(picture, _PICTURE_SIDE) for picture in made))
                metrics.log_text(step, prompt.text, text, right, pictures)
        metrics.log_answers(step, graded[False], graded[True])

    def _nearest(self, picture: Image.Image) -> _Prompt:
        """The prompt whose target picture is nearest to `picture`, by mean squared difference of pixels."""
        values = to_values(np.asarray(picture))
        known = [(prompt, prompt.target) for prompt in self._prompts if prompt.target is not None]
        return min(known, key=lambda one: float((one[1] - values).square().mean()))[0]

    @contextmanager
    def _next_logits(self, executor: Executor) -> Iterator[NextLogits]:
        objective, world = self._run.placed.objective, self._run.world
        if not self._by_cache:
            with encoded_once(self._run.placed.structure.decoder):
                yield RecomputedLogits(self._run, executor, self._media, pad_to=self._pad_to)
            return
        run_as_forward(objective, "run_model")
        config = objective.model.config
        before = attention_by_part(config, config.get_text_config()._attn_implementation)
        objective.model.set_attn_implementation(attention_by_part(config, register()))
        source: NextLogits = CachedLogits(objective.run_model, world.device, self._media)
        led: LedLogits | None = None
        if self._painter is not None:
            head, first = objective.structure.head, objective.model.config.first_code
            source = led = LedLogits(source, head, first, self._painter)
        try:
            yield source
        finally:
            if led is not None:
                led.close()
            objective.model.set_attn_implementation(before)


def is_right(answer: str, expected: Sequence[str]) -> bool:
    """True if `answer` contains one of the texts `expected` as whole words, ignoring case and spaces."""
    said = _words(answer)
    return any(re.search(rf"(?<!\w){re.escape(_words(text))}(?!\w)", said) for text in expected)


def _words(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _fits_cache(run: Run) -> bool:
    """True if the model can generate with a key/value cache in its current layout."""
    model, train = run.placed.model, run.config.train
    if any(run.mesh.size(axis) > 1 for axis in ("tensor", "pipeline", "context", "ulysses")):
        return False
    if train.enable_compile or train.enable_batch_invariant_mode:
        return False
    return model.config.get_text_config()._attn_implementation in _CACHEABLE and not needs_generate(model)


class RecomputedLogits:
    """Next logits of a model in any layout, computed from all tokens so far.

    pad_to: the length to pad every row to.
    """

    joins = True

    def __init__(self, run: Run, executor: Executor, media: MediaInputs, *, pad_to: int | None = None) -> None:
        self._executor, self._world, self._media, self._pad_to = executor, run.world, media, pad_to
        self._split = split_samples if run.config.train.enable_batch_invariant_mode else split_tokens
        self._sharing = sequence_ranks(run.mesh)
        self._vocabulary = run.placed.structure.head.out_features
        self._sequences: list[tuple[list[int], tuple[Media, ...]]] = []

    def start(self, requests: Sequence[Request]) -> Tensor:
        started = [(list(item.ids), item.media) for item in requests]
        self._sequences += started
        return self._run(started)

    def step(self, tokens: Sequence[int]) -> Tensor:
        for (ids, _), token in zip(self._sequences, tokens, strict=True):
            ids.append(token)
        return self._run(self._sequences)

    def keep(self, rows: Sequence[int]) -> None:
        self._sequences = [self._sequences[row] for row in rows]

    def _run(self, sequences: Sequence[tuple[list[int], tuple[Media, ...]]]) -> Tensor:
        samples = [_last_labelled(number, *each) for number, each in enumerate(sequences)]
        batch = self._media.with_values(samples, pack(samples, pad_to=self._pad_to))
        own = self._split(batch, self._sharing)
        found = torch.full((len(sequences), self._vocabulary), -torch.inf, device=self._world.device)
        for values in self._executor.evaluate([batch], compute=logits):
            found[own.labels[own.target_index].to(found.device)] = values.float()
        if self._world.size > 1:
            # If ranks share the tokens of a row, one of them has its last token; and only the last pipeline stage has
            # logits.
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found


def _last_labelled(number: int, ids: list[int], media: tuple[Media, ...]) -> Sample:
    """A sample whose only target is its last position, labeled with `number`."""
    sample = as_sample(ids, media)
    sample.labels[-1] = number
    return sample


def _processor(run: Run) -> MediaProcessor | None:
    found, data = run.inputs.processor, run.config.data
    return None if found is None else MediaProcessor(found, data, MediaCache(_CACHE_BYTES))


def _painter(run: Run) -> FlowPainter | None:
    """The painter for a model with a diffusion decoder, in its current state of training."""
    model, train, device = run.placed.model, run.config.train, run.world.device
    if getattr(model, "flow", None) is None:
        return None
    settings = Guided(train.sample_steps, train.sample_guidance if train.cfg_dropout else 1.0)
    return FlowPainter(model, device, settings, train.seed, hiding(run.inputs.tokenizer, model))


def _read(run: Run, drawn: tuple[Drawing, PictureTokenizer | FlowPainter] | None) -> list[_Prompt]:
    """All prompts with their requests. drawn: for a model that draws. ValueError: a prompt cannot be used, and why."""
    config, tokenizer = run.config, run.inputs.tokenizer
    chat = config.data.task.holds_chats
    context = getattr(run.placed.structure.config, "max_position_embeddings", None)
    form: PromptFormat | None = None
    unseen = {os.path.realpath(path) for path in _listed(config.data.eval_path)}
    prompts = []
    for number, (place, row, path) in enumerate(prompt_rows(config)):
        folder = os.path.dirname(path) or "."
        form = form or PromptFormat(
            tokenizer,
            read_template(tokenizer, run.data.chat_date) if chat else None,
            chat,
            context,
            _processor(run),
            config.data.media_root,
            config.data.row_template,
            *(() if drawn is None else (drawn[0], drawn[1].encode)),
        )
        try:
            if not chat and not isinstance(row.get("prompt"), str):
                raise RowError('has no text under "prompt"; a model that is trained on texts continues one')
            target = _target(form, row, folder)
            row = filled(form, row)
            request = row_request(form, row, number, config.train.sample_tokens, folder)
            if row.get("draw"):
                request = to_draw(form, request)
            elif target is not None and drawn is not None:
                request = request._replace(limit=max(request.limit, drawn[0].room + 1))
            pictures = tuple(found for medium in request.media if (found := _picture(medium)))
            expected = () if target is not None else _expected(row)
            held_out = bool(path) and os.path.realpath(path) in unseen
            prompts.append(_Prompt(_shown(row), request, expected, pictures, target, held_out))
        except RowError as error:
            raise ValueError(f"{place}: {error}") from None
    return prompts


def _target(form: PromptFormat, row: dict[str, Any], folder: str) -> Tensor | None:
    """The picture that the model is to draw for a row, if data.row_template has one. RowError: it cannot be decoded."""
    if form.drawing is None or form.media is None or row.get("image") is None or not is_target(form.row_template):
        return None
    medium = form.media.measure("drawn", row["image"], MediaFolder(folder, form.media_root))
    return form.media.values([as_sample(form.media.processor.drawn_token_ids, (medium,))], 1)["drawn_pixels"][0]


def prompt_rows(config: Config) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the rows to answer, each with a name for messages, and its file if there is one."""
    for text in config.train.sample_prompts:
        yield f"train.sample_prompts {text!r}", {"prompt": text}, ""
    name = "train.sample_prompts_path"
    for path in _listed(config.train.sample_prompts_path):
        file = (PromptLines if Path(path).suffix == ".txt" else JsonLines)(path)
        try:
            for row in file.stream():
                if isinstance(row, BadRow):
                    raise ValueError(
                        f'{row}; a row is such as {{"prompt": "..."}}, and a .txt file has a prompt a line'
                    )
                yield f"{name} {path}:{row.line}", row.value, path
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def _listed(paths: str | None) -> list[str]:
    """The paths in a comma-separated list."""
    return [path.strip() for path in (paths or "").split(",") if path.strip()]


class PromptLines(JsonLines):
    """A text file with one prompt per line, as rows."""

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        try:
            return Row({"prompt": text.decode("utf-8-sig").rstrip("\r")}, self.path, line)
        except UnicodeDecodeError as error:
            return BadRow(self.path, line, f"not UTF-8 text: {error}")


def _expected(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts under "answer", of which an answer must contain one. RowError: they are not texts."""
    answer = row.get("answer")
    if answer is None:
        return ()
    texts = tuple(answer) if isinstance(answer, list) else (answer,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError(f'"answer" must be a text or a list of texts, none of them empty, not {answer!r}')
    return texts


def _shown(row: dict[str, Any]) -> str:
    """The prompt of a row as the log and the report show it."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = conversation_to_answer(row).messages
    said = [_said(message.get("content", "")) for message in messages]
    if len(said) == 1:
        return said[0]
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(messages, said, strict=True))


def _said(content: Any) -> str:
    """The text of a message, with placeholders for its media."""
    if not isinstance(content, list):
        return str(content)
    return "".join(part.get("text") or f"<{MEDIA_PARTS.get(part.get('type'), 'text')}>" for part in content)


def _picture(medium: Media) -> str | None:
    """A small PNG of an image, or of a video's first frame, as a data URL; None for a sound. RowError: it cannot be
    decoded."""
    if medium.kind == "image":
        picture = load_image(medium)
    elif medium.frames is not None:
        first = medium._replace(frames=medium.frames._replace(indices=medium.frames.indices[:1]))
        picture = Image.fromarray(load_video(first, (medium.size[0], medium.size[1]))[0].transpose(1, 2, 0))
    else:
        return None
    return to_data_url(picture, _PICTURE_SIDE)
