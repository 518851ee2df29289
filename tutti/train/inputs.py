"""The data of a run, encoded for its model."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import date
from pathlib import Path

from transformers import PreTrainedModel

from tutti.checkpoint.manager import preview_resume
from tutti.config import Config
from tutti.core.dist import World
from tutti.data.loader import Classes, Data, build_data
from tutti.kinds import Inputs
from tutti.model.build import num_token_ids
from tutti.model.structure import count_flops, towers

log = logging.getLogger(__name__)


def open_data(config: Config, inputs: Inputs, model: PreTrainedModel, world: World, dp_rank: int, dp_size: int) -> Data:
    """The run's data, encoded for `model`; freezes the model's towers if the data has no media. A collective call.

    dp_rank, dp_size: this rank's place among the data-parallel ranks. ValueError, on all ranks: the data cannot be
    used.
    """
    names = [name for _, name in sorted((model.config.id2label or {}).items())]
    numbered = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    data = build_data(
        _dated(config, world),
        inputs.tokenizer,
        world=world,
        dp_rank=dp_rank,
        dp_size=dp_size,
        vocab_size=num_ids(model) if config.data.task.has_tokens else 1,
        classes=Classes(model.config.num_labels, () if numbered else tuple(names)),
        processor=inputs.processor,
    )
    if config.data.task.has_tokens:
        data.deal_by(count_flops(model).batch)
        if data.has_media is False:
            _leave_towers(model)
        elif data.has_media and not data.report.media.numbers["drawn"]:
            _leave_codes(model)
    return data


def num_ids(model: PreTrainedModel) -> int:
    """The number of token ids that rows of the model may contain, image codes not included."""
    codes = getattr(model, "code_decoder", None)
    return max(num_token_ids(model.config), 0 if codes is None else codes.num_ids)


def _leave_codes(model: PreTrainedModel) -> None:
    """Freeze the modules for image codes: the data has no images to draw."""
    codes = getattr(model, "code_decoder", None)
    if codes is not None and any(item.requires_grad for item in codes.parameters()):
        codes.requires_grad_(False)
        log.info("what is for codes of pictures stays as it is, since the data has none that are drawn")


def _dated(config: Config, world: World) -> Config:
    """`config` with data.chat_date set: as given, else as in the checkpoint that the run resumes from, else today. A
    collective call."""
    if config.data.chat_date is not None or not config.data.task.holds_chats:
        return config

    def find() -> str:
        state = preview_resume(config.train.load_checkpoint_path, Path(config.train.output_dir or "")).state
        return state.get("data", {}).get("settings", {}).get("data.chat_date") or date.today().isoformat()

    found = world.broadcast(find() if world.is_main else None)
    return replace(config, data=replace(config.data, chat_date=found))


def _leave_towers(model: PreTrainedModel) -> None:
    """Freeze the media encoders: the data has no media, and weight decay would shrink unused weights."""
    left = [tower for tower in towers(model) if any(item.requires_grad for item in tower.parameters())]
    for tower in left:
        tower.requires_grad_(False)
    if left:
        names = ", ".join(type(tower).__name__ for tower in left)
        log.info("%s: stays as it is, since the data has no media", names)
