"""From rows to samples: text, token ids, and which of them are trained on.

For each batch of rows: (1) every row becomes a text with the character spans that are trained (for a conversation the
chat template defines them); (2) all texts are tokenized in one call, in parallel and without the interpreter lock; (3)
spans become labels. A token is trained on if it *begins* inside a trained span: a token that straddles the border
between header and answer is not, since at inference the header's tokens are given.

- plaintext: every token and an end-of-text token, cut into pieces of at most L tokens.
- conversation: the trained spans; a longer one keeps its last L tokens.
- classification: the first L tokens; the last position is trained on the class.

Labels are shifted here, once: `labels[t]` is the target of position t. A row without targets is a `BadRow`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from tutti.config import Config
from tutti.core.batch import IGNORE, Media, Sample
from tutti.data.media import MediaFolder, MediaSummary, described, plural
from tutti.data.media_cache import MediaCache
from tutti.data.media_places import literal_places, not_taken, shift, with_media
from tutti.data.media_processor import MediaProcessor
from tutti.data.rows import CONVERSATIONS, RowError, class_of, conversation_of, fill, half_surrogate, text_of
from tutti.data.source import BadRow, Row, text_columns
from tutti.data.template import ChatTemplate, read_template
from tutti.data.tokenize import BatchTokenizer, Tokens

_LIMITS = {
    "image": "data.image_max_pixels",
    "drawn": "image_size or tokens of model.decoders.image (of a ready-made model data.image_max_pixels)",
    "video": "data.video_max_frames and data.video_max_pixels",
    "audio": "data.audio_max_seconds",
}
"""The arguments that reduce the number of tokens of media, by kind."""


_HALVES = re.compile("[\ud800-\udfff]")


@dataclass
class Encoder:
    """Turns rows into samples; picklable. Made by `make_encoder`.

    media: the processor of a multimodal model. media_root, row_template: data.media_root and data.row_template. mends:
    unpaired surrogates, which are not characters, become U+FFFD; otherwise the row is bad. notes: counts of rows with
    content that does not reach the model, by kind of content.
    """

    tokenize: BatchTokenizer
    rows: str
    columns: tuple[str, ...]
    max_seq_len: int
    vocab_size: int
    num_labels: int | None
    label_names: tuple[str, ...]
    template: ChatTemplate | None
    mends: bool
    notes: Counter[str]
    media: MediaProcessor | None = None
    media_root: str | None = None
    row_template: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, rows: Sequence[Row | BadRow], source: int = 0) -> list[list[Sample] | BadRow]:
        """Encode rows: returns for each row its samples (several for a long plaintext row), or why there are none.
        source: the source's index.

        ValueError: the tokenizer returns ids that the model does not embed.
        """
        results: list[Any] = list(rows)
        numbers, texts, targets, media = [], [], [], []
        for number, row in enumerate(rows):
            if isinstance(row, BadRow):
                continue
            try:
                text, target, found = self._text(row)
                text = self._characters(text)
            except RowError as error:
                results[number] = BadRow(row.file, row.line, str(error))
                continue
            numbers.append(number)
            texts.append(text)
            targets.append(target)
            media.append(found)
        tokens = self.tokenize(texts)
        self._check_ids(tokens.ids)
        labels = np.full(len(tokens.ids), IGNORE, np.int32)
        if self.template is not None:
            targets = _token_spans(tokens, targets)
        for place, (number, target) in enumerate(zip(numbers, targets, strict=True)):
            begin, end = tokens.ends[place], tokens.ends[place + 1]
            try:
                samples = self._samples(tokens.ids[begin:end], labels[begin:end], target, source)
                if (found := media[place]) is not None:
                    samples = [self._with_media(samples[0], found, tokens.ids[begin:end])]
                results[number] = samples
            except RowError as error:
                results[number] = BadRow(rows[number].file, rows[number].line, str(error))
        return results

    def extras(self, samples: Sequence[Sample], length: int) -> dict[str, Tensor]:
        """The model's inputs in addition to tokens, by argument name, for samples packed to `length` tokens; empty
        if no sample has media. BrokenMediaError: one of them cannot be decoded."""
        return {} if self.media is None else self.media.values(samples, length)

    def summarize_media(self, samples: Sequence[Sample]) -> MediaSummary:
        """Statistics of the samples' media."""
        summary = MediaSummary()
        for sample in samples:
            if not sample.media or self.media is None:
                continue
            for medium, (begin, end) in zip(sample.media, self.media.spans(sample), strict=True):
                summary.add(medium, end - begin)
        return summary.shortened()

    def _text(self, row: Row) -> tuple[str, Any, tuple[Media, ...] | None]:
        """A row's text, its class or its trained character spans, and its media if it has any."""
        value = row.value
        if self.template is not None:
            if self.row_template:
                value = fill(self.row_template, value)
            conversation, entries = with_media(conversation_of(value, self.columns), value)
            if self.columns != CONVERSATIONS[:1] and not any(value.get(column) is not None for column in self.columns):
                named = ", ".join(self.columns)
                self.notes[f"rows lack the column of data.text_keys ({named}); their conversation is in another"] += 1
            if entries and self.media is None:
                raise not_taken(entries)
            if self.media is not None:
                conversation, entries = self.media.place(conversation, entries)
            text, spans = self.template(conversation)
            if self.media is None:
                return text, spans, None
            literal = literal_places(conversation.messages)
            if not entries:
                self.media.expand(text, ())  # reports a placeholder that is spelled in a text
            for place in literal:
                self.notes[f"{place} stays a word of the text, as no column of the row has a medium for it"] += 1
            if not entries:
                return text, spans, None
            folder = MediaFolder(os.path.dirname(row.file), self.media_root)
            found = tuple(self.media.measure(kind, entry, folder) for kind, entry in entries)
            text, places = self.media.expand(text, found)
            return text, shift(spans, places, found), found
        if self.rows == "labels":
            return text_of(value, self.columns), class_of(value, self.num_labels, self.label_names), None
        return text_of(value, self.columns), None, None

    def _with_media(self, sample: Sample, media: tuple[Media, ...], ids: np.ndarray) -> Sample:
        """The sample with its media. ids: of the whole row. RowError: the row was cut and lacks some of the media's
        tokens."""
        self.require_media(media, ids, sample.input_ids, self.max_seq_len)
        values = 0 if self.media is None else self.media.num_values(media)
        return replace(sample, media=media, num_values=values)

    def require_media(self, media: tuple[Media, ...], ids: np.ndarray, kept: np.ndarray, max_seq_len: int) -> None:
        """Raise RowError if `kept`, the part of a row's tokens `ids` within max_seq_len, lacks some of its media's
        tokens."""
        if not media:
            return
        assert self.media is not None
        needed = self.media.count(ids, media)
        if self.media.count(kept, media) < needed:
            kinds = sorted({medium.kind for medium in media})
            raise RowError(
                f"is longer than data.max_seq_len {max_seq_len}, and only text can be cut, of which it has too "
                f"little beside the {needed:,} tokens of its {' and '.join(map(plural, kinds))}: raise "
                f"data.max_seq_len, or lower {' or '.join(_LIMITS[kind] for kind in kinds)}"
            )

    def _characters(self, text: str) -> str:
        """`text` with unpaired surrogates replaced; the number of characters stays the same."""
        if (half := half_surrogate(text)) is None:
            return text
        if not self.mends:
            raise RowError(f"half a surrogate pair, {half!r}, is no character (data.silent_exception makes it U+FFFD)")
        self.notes["halves of surrogate pairs, which are no characters, became U+FFFD"] += 1
        return _HALVES.sub("\ufffd", text)

    def _check_ids(self, ids: np.ndarray) -> None:
        if len(ids) and (highest := int(ids.max())) >= self.vocab_size:
            raise ValueError(_too_large(f"gives token id {highest}", self.vocab_size))

    def _samples(self, ids: np.ndarray, labels: np.ndarray, target: Any, source: int) -> list[Sample]:
        """A row's samples, from its tokens [n] and labels [n], all IGNORE, to be filled in."""
        if self.rows == "documents":
            return _pieces(np.append(ids, np.int32(self.tokenize.tokenizer.eos_token_id)), self.max_seq_len, source)
        if self.rows == "conversations":
            return [_chat(ids, labels, target, self.max_seq_len, source)]
        if not len(ids):
            raise RowError("no trained token: the text has no tokens")
        ids, labels = ids[: self.max_seq_len], labels[: self.max_seq_len]
        labels[-1] = target
        return [Sample(ids, labels, source)]


def _token_spans(tokens: Tokens, spans: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
    """Convert spans of characters, a list for each text, to spans of tokens."""
    places = [place for place, found in enumerate(spans) for _ in range(2 * len(found))]
    chars = [char for found in spans for span in found for char in span]
    borders = iter(tokens.first_from(places, chars))
    return [[(next(borders), next(borders)) for _ in found] for found in spans]


def _pieces(ids: np.ndarray, max_seq_len: int, source: int) -> list[Sample]:
    """Samples of at most `max_seq_len` tokens, with each token except the first of each sample trained on.

    A last piece of one token would have no target, so it gets another token from the piece before.
    """
    count = len(ids)
    if count < 2:
        raise RowError("no trained token: the text has no tokens")
    borders = [*range(0, count, max_seq_len), count]
    if count - borders[-2] == 1 and max_seq_len > 2:
        borders[-2] -= 1
    return [
        Sample(ids[begin:end], np.append(ids[begin + 1 : end], np.int32(IGNORE)), source)
        for begin, end in pairwise(borders)
        if end - begin > 1
    ]


def _chat(ids: np.ndarray, labels: np.ndarray, spans: list[tuple[int, int]], max_seq_len: int, source: int) -> Sample:
    """The sample of the last `max_seq_len` tokens, trained on the token spans."""
    start = max(0, len(ids) - max_seq_len)
    trained = False
    for first, last in spans:
        if first < 0 or last < 0:
            raise RowError(
                "the tokenizer gives no character offsets and joins text across the border of a trained span, so that "
                "the loss mask can't be exact; use its fast version"
            )
        first = max(first, start + 1)
        if first < last:
            labels[first - 1 : last - 1] = ids[first:last]
            trained = True
    if trained:
        return Sample(ids[start:], labels[start:], source)
    if not spans:
        raise RowError("no trained token: no assistant message, or none that is to be trained on")
    if start:
        raise RowError(f"no trained token among the last {max_seq_len} (data.max_seq_len) of {len(ids)}")
    raise RowError("no trained token: what would be trained on is empty")


def make_encoder(
    config: Config,
    tokenizer: Any,
    *,
    vocab_size: int,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    processor: Any = None,
) -> Encoder:
    """The encoder for data.data_type.

    tokenizer: with its chat template set, for conversations. vocab_size: number of rows of the model's embedding.
    num_labels, label_names: the classes, for classification. processor: of a multimodal model. ValueError: tokenizer
    and model do not fit.
    """
    data, kind = config.data, config.data.task.rows
    if len(tokenizer) > vocab_size:
        raise ValueError(_too_large(f"has {len(tokenizer)} tokens", vocab_size))
    if kind == "documents" and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which ends every text of data.data_type plaintext")
    if data.max_seq_len < 2 and kind != "labels":
        raise ValueError(f"data.max_seq_len {data.max_seq_len} leaves nothing to predict: give 2 or more")
    template = read_template(tokenizer, data.chat_date) if kind == "conversations" else None
    media = None
    if processor is not None:
        media = MediaProcessor(
            processor, data, MediaCache(data.media_cache_mb * 2**20) if data.media_cache_mb else None
        )
    return Encoder(
        tokenize=BatchTokenizer(
            tokenizer,
            special=kind == "labels",
            places=kind == "conversations",
            repeated=media.placeholders if media else (),
        ),
        rows=kind,
        columns=text_columns(config),
        max_seq_len=data.max_seq_len,
        vocab_size=vocab_size,
        num_labels=num_labels,
        label_names=tuple(label_names),
        template=template,
        mends=data.silent_exception,
        notes=Counter() if template is None else template.notes,
        media=media,
        media_root=data.media_root,
        row_template=data.row_template,
    )


def describe(sample: Sample, tokenizer: Any, media: MediaProcessor | None = None) -> list[tuple[str, bool]]:
    """The sample as consecutive pieces of text, each with whether its tokens are trained on (are targets).

    A classification sample has none: its target is a class, not a token. media: the processor, with which media are
    shown by kind, size and number of tokens.
    """
    trained = np.zeros(len(sample), bool)
    trained[1:] = sample.labels[:-1] == sample.input_ids[1:]
    spans = media.spans(sample) if media is not None and sample.media else []
    inner = {place for begin, end in spans for place in range(begin + 1, end)}
    shown = {
        begin: f"[{medium.kind} {number}: {described(medium)}, {end - begin:,} tokens]"
        for number, (medium, (begin, end)) in enumerate(zip(sample.media, spans, strict=False), 1)
    }
    edges = {*(np.flatnonzero(np.diff(trained)) + 1).tolist(), *(place for span in spans for place in span)}
    borders = sorted(({0, len(sample)} | edges) - inner)
    return [
        (shown.get(begin) or tokenizer.decode(sample.input_ids[begin:end].tolist()), bool(trained[begin]))
        for begin, end in pairwise(borders)
    ]


def _too_large(what: str, vocab_size: int) -> str:
    return (
        f"the tokenizer {what} but the model embeds only {vocab_size}: give the tokenizer that belongs to the model "
        "(model.tokenizer_path) or a model whose vocab_size is large enough"
    )
