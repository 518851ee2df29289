"""Ready-made models that draw: their own modules for codes of pictures, as a composed model has them.

- Janus sees pictures by a tower and draws them by codes. Its `generation_*` modules embed codes and predict them, and
  `vqmodel` is the tokenizer of pictures that codes come from, which stays as it is. Read as a `CodeDecoder`, they are
  trained and generate as those that `model.decoders` puts beside a language model; no module is added, so an export is
  the plain folder that it was.
- Emu3 and Chameleon have codes in their vocabulary, and see and draw by them alike: each picture becomes codes, and the
  language model is trained on rows of tokens. Pictures are squares of one size, since codes of a picture would depend
  on the sizes of those that it is padded beside. Chameleon's tokenizer makes no pictures of codes.

A model draws if its weights are read from a folder with a processor. In training it does so with chats, and where its
depth (of Janus also its matrices) is not divided over ranks; elsewhere it sees pictures alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tutti.config import Config, DataConfig, ModelConfig
from tutti.core.batch import DRAWN_PIXELS
from tutti.core.modules import wrap_forward
from tutti.core.pixels import to_values
from tutti.model.omni import CodeDecoder, with_code_logits
from tutti.model.omni_processor import CODE, DRAWN, drawing_marks
from tutti.model.vq import PictureCodes

_FAMILIES = ("janus", "emu3", "chameleon")
"""model_type of the ready-made models that draw, or are trained to."""

_AREA = 720 * 720
"""Pixels of a picture that Emu3 draws unless data.image_max_pixels says less: as its processor asks for."""

_DRAWN_AS_TEXT = (
    "{%- set drawn = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}"
    "{%- set parts = namespace(all=[]) -%}{%- for part in message['content'] -%}"
    "{%- set parts.all = parts.all + [{'type': 'text', 'text': 'CODE'} if part['type'] == 'drawn' else part] -%}"
    "{%- endfor -%}{%- set drawn.messages = drawn.messages + [dict(message, content=parts.all)] -%}"
    "{%- else -%}{%- set drawn.messages = drawn.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = drawn.messages -%}"
).replace("CODE", CODE)
"""Jinja that has a template write the placeholder of codes where a message has a picture that is drawn."""


def ready_folder(model: ModelConfig) -> Path | None:
    """The folder of the ready-made model that `model` names, if it draws."""
    folder = Path(model.model_path or "")
    processors = ("processor_config.json", "preprocessor_config.json")
    if model.model_path is None or not any((folder / name).is_file() for name in processors):
        return None
    return folder if _family(folder) in _FAMILIES else None


def _family(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):  # which building the model tells of
        return None


def sees_codes(folder: Path) -> bool:
    """True if the ready-made model in `folder` sees pictures by the codes that it draws them by."""
    return _family(folder) != "janus"


def drawn_size(folder: Path, data: DataConfig) -> int | None:
    """The side in pixels of what the ready-made model in `folder` draws, where that is not its own."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["model_type"] != "emu3":
        return None
    factor = 2 ** (len(content["vq_config"]["channel_multiplier"]) - 1)
    return int(min(_AREA, data.image_max_pixels or _AREA) ** 0.5) // factor * factor


def draws(config: Config) -> bool:
    """True if a ready-made model is trained to draw."""
    return ready_folder(config.model) is not None and obstacle(config) is None


def obstacle(config: Config) -> str | None:
    """The argument that keeps a ready-made model from being trained to draw, with its value; None if none does."""
    train, task = config.train, config.data.task
    if task.rows != "conversations" or task.head != "tokens":
        return f"data.data_type {config.data.data_type}"
    folder = ready_folder(config.model)
    # What embeds codes beyond the vocabulary lies within the table that tensor ranks split.
    axes = (
        ["pipeline_parallel_size"]
        if folder and sees_codes(folder)
        else ["tensor_parallel_size", "pipeline_parallel_size"]
    )
    for name in axes:
        if (size := getattr(train, name)) > 1:
            return f"train.{name} {size}"
    return None


class JanusCodes(CodeDecoder):
    """The modules of a Janus that are for codes of pictures. It is a view, and holds nothing."""

    def __init__(self, model: Any, first: int, kept: frozenset[int]) -> None:
        nn.Module.__init__(self)
        inner, head = model.model, model.model.generation_head
        self.first, self.number, self.kept = first, inner.generation_embeddings.num_embeddings, kept
        self.embed = nn.Sequential(inner.generation_embeddings, inner.generation_aligner)  # type: ignore[assignment]
        self.middle = nn.Sequential(head.proj_out, head.activation_fn)
        self.head = head.vision_head


class VocabularyCodes(CodeDecoder):
    """Codes of a model whose vocabulary has them as tokens (Emu3, Chameleon): it embeds and predicts them as any."""

    def __init__(self, model: Any, num_ids: int, kept: frozenset[int]) -> None:
        """ValueError: the tokens are not in the order of their codes."""
        nn.Module.__init__(self)
        ids = model.model.vocabulary_mapping.img2bpe
        self.first, self.number, self.kept, self._num_ids = ids[0], len(ids), kept, num_ids
        self.head = None  # type: ignore[assignment]
        if any(ids.get(code) != self.first + code for code in range(self.number)):
            raise ValueError("model.model_path: the tokens of pictures are not in the order of their codes")

    @property
    def num_ids(self) -> int:
        return self._num_ids


def let_draw(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, data: DataConfig) -> None:
    """Make a ready-made model embed codes and predict them, where they are tokens beyond its vocabulary, and have the
    chat template of `tokenizer` write their placeholder. folder: of its weights, among which those of its tokenizer of
    pictures are.
    """
    tokenizer.add_tokens([CODE], special_tokens=True)
    write_drawn(tokenizer)
    num_ids = max(model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1)
    kept = frozenset({drawing_marks(tokenizer).start, tokenizer.bos_token_id, model.config.image_token_id})
    beyond = hasattr(model.model, "generation_head")
    codes = (JanusCodes if beyond else VocabularyCodes)(model, num_ids, kept)
    # Not registered: its modules are the model's, under names of their own.
    model.__dict__ |= {"code_decoder": codes, "drawing_folder": folder, "drawing_size": drawn_size(folder, data)}
    if not beyond:
        return
    wrap_forward(model.get_input_embeddings(), "codes", partial(partial, _embed, codes))
    wrap_forward(model, "codes", partial(partial, _with_logits, model.get_output_embeddings(), codes))


def _embed(codes: CodeDecoder, table: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    return codes.put(ids, table(ids.masked_fill(ids >= codes.first, 0)))


def _with_logits(head: nn.Module, codes: CodeDecoder, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return with_code_logits(partial(forward, *args, **kwargs), head, codes)


def write_drawn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the chat template write the placeholder of codes for pictures that are drawn, if the model draws."""
    source = tokenizer.chat_template
    if CODE in tokenizer.get_vocab() and isinstance(source, str) and not source.startswith(_DRAWN_AS_TEXT):
        tokenizer.chat_template = _DRAWN_AS_TEXT + source


def picture_text(tokenizer: Any, drawn: PictureCodes) -> str:
    """A picture as text, with a placeholder for each code, between the tokens that begin and end it. Emu3 says its size
    first, and ends each row of it."""
    start, end = tokenizer.convert_ids_to_tokens(list(drawing_marks(tokenizer)))
    sized = getattr(tokenizer, "image_wrapper_token", None)
    if sized is None:
        return start + CODE * drawn.tokens + end
    side = int(drawn.tokens**0.5)
    return f"{start}{side}*{side}{sized}{(CODE * side + _END_OF_ROW) * side}{tokenizer.eof_token}{end}"


_END_OF_ROW = "<|extra_200|>"
"""Emu3's token after each row of a picture."""


@dataclass
class DrawingProcessor:
    """The processor of a ready-made model that draws: `inner`, its own, beside which drawn pictures become places for
    codes between the tokens that begin and end one. plain: the tokenizer as its folder has it, which exports get.
    draws_all: the model sees pictures as such, too."""

    inner: Any
    drawn: PictureCodes
    tokenizer: PreTrainedTokenizerBase
    plain: PreTrainedTokenizerBase
    draws_all: bool = False

    def __post_init__(self) -> None:
        self.drawn_token, self.drawn_token_ids = CODE, [self.tokenizer.get_vocab()[CODE]]
        self._replacement = picture_text(self.tokenizer, self.drawn)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, text: Sequence[str], drawn: Sequence[Image.Image] = (), **kwargs: Any) -> Any:
        """As `inner`; drawn: the pictures that the text has placeholders of codes for, in their order."""
        if not drawn:
            return self.inner(text=text, **kwargs)
        (source,) = text
        written = source.replace(CODE, self._replacement)
        if any(kwargs.get(kind) for kind in ("images", "videos", "audio")):
            found = dict(self.inner(text=[written], **kwargs))
        else:
            found = {**self.tokenizer([written], return_tensors="pt"), "text_replacement_offsets": [[]]}
        others = iter(found["text_replacement_offsets"][0])
        own = {"type": DRAWN, "text": CODE, "replacement": self._replacement}
        pieces = source.split(CODE)
        offsets = [offset for piece in pieces[:-1] for offset in (*self._within(piece, others), own)] + [*others]
        return {**found, DRAWN_PIXELS: self._pixels(drawn), "text_replacement_offsets": [offsets]}

    def _pixels(self, drawn: Sequence[Image.Image]) -> Tensor:
        """[N, 3, S, S]: as the model sees pictures by itself, if it only sees them, else in [-1, 1]."""
        if not self.drawn.draws:
            return self.inner.image_processor(images=list(drawn), return_tensors="pt")["pixel_values"]
        return torch.stack([to_values(np.asarray(self.drawn.size.cut(picture))) for picture in drawn])

    def _within(self, piece: str, others: Any) -> list[Any]:
        """The next of what `inner` has replaced, as much of it as a piece of the text has placeholders."""
        return [next(others) for _ in range(piece.count(self.inner.image_token))]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `inner` to a folder, with the plain tokenizer."""
        self.inner.tokenizer = self.plain
        try:
            self.inner.save_pretrained(folder)
        finally:
            self.inner.tokenizer = self.tokenizer
