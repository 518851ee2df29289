"""The table of tasks: the values of `data.data_type`, and what the program needs to know about each.

A task is a row format together with what is learned from it. Its loss and metrics are in the module that its row names;
how rows are read and which head the model gets follows from the other columns. To add a task, write its module
(`tutti.train.tasks`) and its row here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TaskRow:
    """One task.

    module: where `make_task(config)` is. doc: describes its rows, for the reference of arguments. columns: default of
    data.text_keys. rows: the row format, which determines the encoder. head: the model's output: logits of tokens,
    logits of model.num_labels classes, or one number; the last two are at the last token of a sequence. kind: the kind
    of model, a module of `tutti.kinds`. Only language models have tokens and a tokenizer; in models of pixels an image
    counts as one token. losses: if the loss is a sum of several kinds, their default weights.
    """

    module: str
    doc: str
    columns: str
    rows: Literal["documents", "conversations", "labels", "pairs", "images", "captions"]
    head: Literal["tokens", "classes", "scalar", "pixels"] = "tokens"
    kind: Literal["language", "autoencoder", "denoiser"] = "language"
    losses: Mapping[str, float] = field(default_factory=dict)

    @property
    def holds_chats(self) -> bool:
        """True if rows are rendered with a chat template."""
        return self.rows in ("conversations", "pairs")

    @property
    def has_tokens(self) -> bool:
        """True if the model is a language model, whose rows become tokens."""
        return self.kind == "language"


TASKS: dict[str, TaskRow] = {
    "plaintext": TaskRow(
        module="tutti.train.tasks.language",
        doc="text trained on whole",
        columns="content_split",
        rows="documents",
    ),
    "conversation": TaskRow(
        module="tutti.train.tasks.language",
        doc="a chat trained on its assistant turns",
        columns="messages",
        rows="conversations",
        losses={"text": 1.0, "code": 1.0, "feature": 1.0, "flow": 1.0},
    ),
    "classification": TaskRow(
        module="tutti.train.tasks.classification",
        doc="a text with a class label",
        columns="text",
        rows="labels",
        head="classes",
    ),
    "dpo": TaskRow(
        module="tutti.train.tasks.dpo",
        doc="a prompt with a chosen and a rejected answer",
        columns="prompt",
        rows="pairs",
    ),
    "reward": TaskRow(
        module="tutti.train.tasks.reward",
        doc="a prompt with a chosen and a rejected answer, which are scored",
        columns="prompt",
        rows="pairs",
        head="scalar",
    ),
    "image": TaskRow(
        module="tutti.train.tasks.reconstruction",
        doc="an image, which an autoencoder of diffusers (VQModel, AutoencoderKL) learns to reconstruct",
        columns="image",
        rows="images",
        head="pixels",
        kind="autoencoder",
        losses={"l1": 1.0, "mse": 1.0, "commitment": 1.0, "kl": 1e-6},
    ),
    "diffusion": TaskRow(
        module="tutti.train.tasks.diffusion",
        doc="a picture or video with a caption, which a diffusion transformer learns to draw",
        columns="prompt,text,caption",
        rows="captions",
        head="pixels",
        kind="denoiser",
    ),
}
