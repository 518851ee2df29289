"""The Hugging Face processor of a model that takes images, video or sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from tutti.config import Config


def build_processor(config: Config, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The processor in the folder of the tokenizer or the model, with `tokenizer` as its own; None where there is none.

    ValueError: there is one that cannot be used.
    """
    for name in (config.model.tokenizer_path, config.model.model_path, config.model.config_path):
        if name is None:
            continue
        folder = Path(name) if Path(name).is_dir() else Path(name).parent
        if not any((folder / file).is_file() for file in ("processor_config.json", "preprocessor_config.json")):
            continue
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # processors fail in many ways, such as for a package that is missing
            line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"model.tokenizer_path: the processor in {folder} cannot be used: {line}") from error
        if not isinstance(processor, ProcessorMixin):
            return None
        processor.tokenizer = tokenizer
        processor.chat_template = tokenizer.chat_template
        return processor
    return None
