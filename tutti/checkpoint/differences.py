"""Arguments that affect a run's tensors and have changed since a checkpoint was saved.

A checkpoint that does not fit would be reported with hundreds of tensors, but the user can fix it with one or two
arguments.
"""

from __future__ import annotations

from pathlib import Path

from tutti.config import ARGUMENTS, get
from tutti.config.load import from_dict
from tutti.config.yamlfile import parse_value

CONFIG = "config.yaml"

_SHAPING = (
    "model.",
    "train.architecture",
    "train.optimizer",
    "train.lora_",
    "train.freeze",
    "train.ema_",
    "data.data_type",
)


def differences(saved: Path, now: str) -> str:
    """A sentence that names the arguments to set back. saved: the config.yaml of a checkpoint, if it has one. now:
    the text of the run's, "" if there is none."""
    changes: list[str] = []
    if now and saved.is_file():
        before, after = (from_dict(parse_value(text)) for text in (saved.read_text(encoding="utf-8"), now))
        for name in ARGUMENTS:
            old, new = get(before, name), get(after, name)
            if name.startswith(_SHAPING) and old != new:
                changes.append(f"{name} is {new} and was {old}")
    if changes:
        return f"Set back what has changed since it was saved: {'; '.join(changes)}"
    return "Load it with the model.*, train.architecture and train.optimizer it was saved with"
