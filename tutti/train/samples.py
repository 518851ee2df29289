"""What the model says as it trains: prompts that it completes at each evaluation and when training ends.

The model that trains is the one that speaks, as it is laid out over the ranks. All of them run the same prompts,
packed into one row, through the objective; the most likely next token of each is appended, and the longer row is run
again, until every answer has ended or is long enough. There is no cache of keys and values: for a few short answers the
repetition costs less than a second way to run every layout would. Nothing is drawn at random and nothing that training
uses is touched, so that a run trains the same, bit for bit, with prompts and without.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from tutti.config import Config
from tutti.core.batch import IGNORE, Sample, pack
from tutti.data.formats import BadRow, JsonLines, Row
from tutti.data.rows import RowError, conversation_of
from tutti.parallel.pipeline.executor import Executor
from tutti.parallel.sequence import sequence_ranks, split_samples, split_tokens
from tutti.train.logging.metrics import Metrics
from tutti.train.objective import Objective, logits
from tutti.train.placement import Run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """text: as it is shown. ids: what the answer follows. limit: most tokens of the answer."""

    text: str
    ids: tuple[int, ...]
    limit: int


class Samples:
    """The prompts of train.sample_prompts and train.sample_prompts_path, and how the model answers them.

    ValueError: the file is not there, or a prompt cannot be used.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self._objective, self._mesh, self._world = run.placed.objective, run.mesh, run.world
        self._split = split_samples if config.train.enable_batch_invariant_mode else split_tokens
        self._tokenizer = run.tokenizer
        self._prompts = [] if run.placed.structure.classifies else _read(run)
        # Rows of one length need one compiled program; without compilation, padding would only cost time.
        room = sum(len(prompt.ids) + prompt.limit for prompt in self._prompts)
        self._pad_to = room if config.train.enable_compile else None
        self._shown = -1

    def show(self, step: int, metrics: Metrics, executor: Executor) -> None:
        """Answer the prompts, once a step, into the log, the report and the other places. A collective call."""
        if not self._prompts or step == self._shown:
            return
        self._shown = step
        ends = _end_ids(self._objective)
        self._objective.eval()
        with torch.no_grad():
            answers = self._answers(ends, executor)
        self._objective.train()
        for prompt, ids in zip(self._prompts, answers, strict=True):
            answer = str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
            log.info("step %d, sample: %s -> %s", step, " ".join(prompt.text.split()), " ".join(answer.split()))
            metrics.log_text(step, prompt.text, answer)

    def _answers(self, ends: frozenset[int], executor: Executor) -> list[list[int]]:
        """The most likely tokens after each prompt, without the one that ends the answer."""
        answers: list[list[int]] = [[] for _ in self._prompts]
        going = list(range(len(self._prompts)))
        while going:
            rows = [(number, [*self._prompts[number].ids, *answers[number]]) for number in going]
            chosen = self._next(rows, executor)
            for number in going:
                if chosen[number] not in ends:
                    answers[number].append(chosen[number])
            limits = [prompt.limit for prompt in self._prompts]
            going = [n for n in going if chosen[n] not in ends and len(answers[n]) < limits[n]]
        return answers

    def _next(self, rows: Sequence[tuple[int, list[int]]], executor: Executor) -> list[int]:
        """The next token of each numbered row; -1 for the numbers that are not there."""
        world = self._world
        batch = pack([_sample(number, ids) for number, ids in rows], pad_to=self._pad_to)
        own = self._split(batch, sequence_ranks(self._mesh))
        chosen = torch.full((len(self._prompts),), -1, dtype=torch.int64, device=world.device)
        for values in executor.evaluate([batch], compute=logits):
            chosen[own.labels[own.target_index].to(world.device)] = values.argmax(-1)
        if world.size > 1:
            # Where ranks share the tokens of a row, one of them holds its last, and only the last stage of a pipeline
            # has logits; and all must choose the same.
            dist.all_reduce(chosen, dist.ReduceOp.MAX)
        return chosen.tolist()


def _sample(number: int, ids: list[int]) -> Sample:
    """A row whose one target is its last position, labelled with the row's number."""
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[-1] = number
    return Sample(np.asarray(ids, np.int32), labels)


def _end_ids(objective: Objective) -> frozenset[int]:
    """The tokens that end an answer, which `tutti.train.placement` has put into the model's generation config."""
    ends = objective.model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _read(run: Run) -> list[Prompt]:
    """All prompts as token ids. ValueError: which one cannot be used, and why."""
    config, chat = run.config, run.config.data.task.holds_chats
    context = getattr(run.placed.structure.config, "max_position_embeddings", None)
    prompts = []
    for place, row in _rows(config):
        try:
            text, ids = _encode(row, run.tokenizer, chat=chat)
        except RowError as error:
            raise ValueError(f"{place}: {error}") from None
        limit = config.train.sample_tokens if context is None else min(config.train.sample_tokens, context - len(ids))
        if not ids or limit < 1:
            raise ValueError(
                f"{place}: the prompt has {len(ids)} tokens, and an answer to it would need room in {context}"
            )
        prompts.append(Prompt(text, tuple(ids), limit))
    return prompts


def _rows(config: Config) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is to be answered, as rows with `prompt` or a conversation, each with the name of its place."""
    for text in config.train.sample_prompts:
        yield f"train.sample_prompts {text!r}", {"prompt": text}
    if config.train.sample_prompts_path is None:
        return
    path = config.train.sample_prompts_path
    name = "train.sample_prompts_path"
    file = (PromptLines if Path(path).suffix == ".txt" else JsonLines)(path)
    try:
        for row in file.stream():
            if isinstance(row, BadRow):
                raise ValueError(f'{row}; a row is such as {{"prompt": "..."}}, and a .txt file has a prompt a line')
            yield f"{name} {path}:{row.line}", row.value
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


class PromptLines(JsonLines):
    """A text file with a prompt a line, as rows."""

    def _parse(self, text: bytes, line: int) -> Row | BadRow:
        try:
            return Row({"prompt": text.decode("utf-8-sig").rstrip("\r")}, self.path, line)
        except UnicodeDecodeError as error:
            return BadRow(self.path, line, f"not UTF-8 text: {error}")


def _encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> tuple[str, list[int]]:
    """The prompt as it is shown, and its token ids: a user's message or a conversation to answer, or a text to go on
    with."""
    prompt = row.get("prompt")
    if not chat:
        if not isinstance(prompt, str):
            raise RowError('has no text under "prompt"; a model that is trained on texts goes on with one')
        return prompt, tokenizer(prompt).input_ids
    if prompt is not None:
        row = {**row, "messages": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt}
    conversation = conversation_of(row, ("messages",))
    messages = conversation.messages
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise RowError("the conversation has no message to answer")
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=conversation.tools, tokenize=False, add_generation_prompt=True, **conversation.kwargs
        )
    except Exception as error:  # a template may fail in any way on messages it was not made for
        raise RowError(f"the chat template can't render it: {error}") from None
    shown = (
        messages[0]["content"] if len(messages) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in messages)
    )
    return str(shown), tokenizer(str(text), add_special_tokens=False).input_ids
