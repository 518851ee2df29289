"""The Hugging Face processor of a multimodal model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from tutti.config import Config
from tutti.model.drawing import DrawingProcessor, drawn_size, ready_folder, sees_codes
from tutti.model.omni_config import is_composed
from tutti.model.omni_processor import CODE, compose_processor
from tutti.model.tokenizer import build_tokenizer, set_chat_template
from tutti.model.vq import read_codes

log = logging.getLogger(__name__)


def build_processor(config: Config, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor in the folder of the tokenizer or the model, using `tokenizer`; for a composed model it is
    composed of its parts'. None if there is none, or if it cannot be used, which is a warning since text can be
    trained on without it."""
    if is_composed(config.model):
        return compose_processor(config.model, tokenizer)
    for name in (config.model.tokenizer_path, config.model.model_path, config.model.config_path):
        if name is None:
            continue
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        if not any((folder / file).is_file() for file in ("processor_config.json", "preprocessor_config.json")):
            continue
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # processors fail in many ways, for example if a package is missing
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("the processor in %s cannot be used, so that rows with media are refused: %s", folder, line)
            return None
        if not isinstance(processor, ProcessorMixin):
            return None
        processor.tokenizer = tokenizer
        processor.chat_template = tokenizer.chat_template
        drawn = ready_folder(config.model)
        if drawn is not None and CODE in tokenizer.get_vocab():
            plain = _plain(config)
            processor.chat_template = plain.chat_template
            codes = read_codes(drawn, "model.model_path", drawn_size(drawn, config.data))
            return DrawingProcessor(processor, codes, tokenizer, plain, sees_codes(drawn))
        return processor
    return None


def _plain(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer without the additions for a model that draws."""
    tokenizer = build_tokenizer(config)
    if config.data.task.holds_chats:
        set_chat_template(tokenizer, config.data.chat_template)
    return tokenizer
