"""Ready-made models that draw: their own modules for image codes, with the interface of a composed model.

- Janus sees images through a tower and draws them with codes. Its `generation_*` modules embed and predict codes, and
  `vqmodel` is the image tokenizer that the codes come from, which is frozen. Through a `CodeDecoder` they are trained
  and used for generation like those of `model.decoders` in a composed model. No module is added, so an export has the
  original layout.
- Emu3 and Chameleon have codes in their vocabulary, and use them both to see and to draw: each image becomes codes, and
  the language model is trained on rows of tokens. All images are squares of one size, since an image's codes would
  otherwise depend on the sizes of the images with which it is padded. Chameleon's tokenizer cannot decode codes to
  images.

A model draws if its weights are read from a folder with a processor. It is trained to draw on chats, without pipeline
parallelism (and for Janus without tensor parallelism); otherwise it only sees images.
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
"""model_type of the ready-made models that draw, or can be trained to."""

_AREA = 720 * 720
"""Pixels of an image that Emu3 draws unless data.image_max_pixels is smaller, as in its processor."""

_DRAWN_AS_TEXT = (
    "{%- set drawn = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is defined and message['content'] is not string and message['content'] is iterable -%}"
    "{%- set parts = namespace(all=[]) -%}{%- for part in message['content'] -%}"
    "{%- set parts.all = parts.all + [{'type': 'text', 'text': 'CODE'} if part['type'] == 'drawn' else part] -%}"
    "{%- endfor -%}{%- set drawn.messages = drawn.messages + [dict(message, content=parts.all)] -%}"
    "{%- else -%}{%- set drawn.messages = drawn.messages + [message] -%}{%- endif -%}"
    "{%- endfor -%}{%- set messages = drawn.messages -%}"
).replace("CODE", CODE)
"""Jinja code that makes a template write the code placeholder for images to draw in a message."""


def ready_folder(model: ModelConfig) -> Path | None:
    """The folder of the ready-made model that `model` names, if it can draw."""
    folder = Path(model.model_path or "")
    processors = ("processor_config.json", "preprocessor_config.json")
    if model.model_path is None or not any((folder / name).is_file() for name in processors):
        return None
    return folder if _family(folder) in _FAMILIES else None


def _family(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):  # building the model reports this
        return None


def sees_codes(folder: Path) -> bool:
    """True if the ready-made model in `folder` sees images through the same codes with which it draws."""
    return _family(folder) != "janus"


def drawn_size(folder: Path, data: DataConfig) -> int | None:
    """The side in pixels of images that the ready-made model in `folder` draws, if its tokenizer does not fix it."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if content["model_type"] != "emu3":
        return None
    factor = 2 ** (len(content["vq_config"]["channel_multiplier"]) - 1)
    return int(min(_AREA, data.image_max_pixels or _AREA) ** 0.5) // factor * factor


def draws(config: Config) -> bool:
    """True if a ready-made model is trained to draw."""
    return ready_folder(config.model) is not None and obstacle(config) is None


def obstacle(config: Config) -> str | None:
    """The argument (with its value) that prevents a ready-made model from being trained to draw; None if there is
    none."""
    train, task = config.train, config.data.task
    if task.rows != "conversations" or task.head != "tokens":
        return f"data.data_type {config.data.data_type}"
    folder = ready_folder(config.model)
    # The embedding of codes beyond the vocabulary is within the table that tensor ranks split.
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
    """The modules of a Janus model for image codes. A view without parameters."""

    def __init__(self, model: Any, first: int, kept: frozenset[int]) -> None:
        nn.Module.__init__(self)
        inner, head = model.model, model.model.generation_head
        self.first, self.number, self.kept = first, inner.generation_embeddings.num_embeddings, kept
        self.embed = nn.Sequential(inner.generation_embeddings, inner.generation_aligner)  # type: ignore[assignment]
        self.middle = nn.Sequential(head.proj_out, head.activation_fn)
        self.head = head.vision_head


class VocabularyCodes(CodeDecoder):
    """Codes that are tokens of a model's vocabulary (Emu3, Chameleon), embedded and predicted like any token."""

    def __init__(self, model: Any, num_ids: int, kept: frozenset[int]) -> None:
        """Raises ValueError if the tokens are not in the order of their codes."""
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
    """Make a ready-made model embed and predict codes, if they are beyond its vocabulary, and make the chat template
    of `tokenizer` write their placeholder. folder: of its weights, including those of its image tokenizer."""
    tokenizer.add_tokens([CODE], special_tokens=True)
    write_drawn(tokenizer)
    num_ids = max(model.config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1)
    kept = frozenset({drawing_marks(tokenizer).start, tokenizer.bos_token_id, model.config.image_token_id})
    beyond = hasattr(model.model, "generation_head")
    codes = (JanusCodes if beyond else VocabularyCodes)(model, num_ids, kept)
    # Not registered: its modules belong to the model, under their own names.
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
    """Make the chat template write the code placeholder for images to draw, if the model draws."""
    source = tokenizer.chat_template
    if CODE in tokenizer.get_vocab() and isinstance(source, str) and not source.startswith(_DRAWN_AS_TEXT):
        tokenizer.chat_template = _DRAWN_AS_TEXT + source


def picture_text(tokenizer: Any, drawn: PictureCodes) -> str:
    """An image as text, with a placeholder per code, between the tokens that begin and end it. Emu3 writes its size
    first, and ends each row of codes."""
    start, end = tokenizer.convert_ids_to_tokens(list(drawing_marks(tokenizer)))
    sized = getattr(tokenizer, "image_wrapper_token", None)
    if sized is None:
        return start + CODE * drawn.tokens + end
    side = int(drawn.tokens**0.5)
    return f"{start}{side}*{side}{sized}{(CODE * side + _END_OF_ROW) * side}{tokenizer.eof_token}{end}"


_END_OF_ROW = "<|extra_200|>"
"""Emu3's token after each row of an image."""


@dataclass
class DrawingProcessor:
    """The processor of a ready-made model that draws: `inner`, the model's own, plus images to draw, which become
    placeholders for codes between the tokens that begin and end an image.

    plain: the tokenizer as in the model's folder, for exports. draws_all: the model also sees images as codes.
    """

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
        """As `inner`. drawn: the images for the text's code placeholders, in order."""
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
        """Pixels [N, 3, S, S]: preprocessed as the model's inputs if it only sees images, else in [-1, 1]."""
        if not self.drawn.draws:
            return self.inner.image_processor(images=list(drawn), return_tensors="pt")["pixel_values"]
        return torch.stack([to_values(np.asarray(self.drawn.size.cut(picture))) for picture in drawn])

    def _within(self, piece: str, others: Any) -> list[Any]:
        """The next replacements of `inner`, as many as a piece of text has placeholders."""
        return [next(others) for _ in range(piece.count(self.inner.image_token))]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `inner` to a folder, with the plain tokenizer."""
        self.inner.tokenizer = self.plain
        try:
            self.inner.save_pretrained(folder)
        finally:
            self.inner.tokenizer = self.tokenizer
