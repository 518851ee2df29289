"""Find the model that `infer.model_path` names: a folder, an adapter, a run's output folder, or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tutti.checkpoint.adapter import base_path, is_adapter_folder, read_composed
from tutti.checkpoint.hub import with_local_paths
from tutti.checkpoint.trained import TrainedModel, find_trained, is_of_run
from tutti.config import Config, DataConfig, ModelConfig, TrainConfig
from tutti.core.dist import World


@dataclass(frozen=True)
class ModelSource:
    """The place that a model is loaded from.

    config: describes the model and its tokenizer. trained: the checkpoint with the weights, unless they are at
    config.model.model_path. template: data.chat_template of the training. of_chats: it was trained on conversations.
    """

    config: Config
    trained: TrainedModel | None = None
    template: str = "default"
    of_chats: bool = False

    @property
    def reads_weights(self) -> bool:
        """True if weights are read from config.model.model_path; a checkpoint of adapters also needs its base's."""
        return self.trained is None or self.config.train.architecture == "lora"


def find_source(config: Config, world: World) -> ModelSource:
    """The model at infer.model_path, with files for hub names downloaded. Collective.

    ValueError, on all ranks, naming `infer.*`: there is none.
    """
    with named_as_infer():
        source = _look(with_local_paths(config, world), world)
        # An adapter, or a run, may refer to its base model by hub name.
        described = with_local_paths(source.config, world, weights=source.reads_weights)
        return replace(source, config=described)


def _look(config: Config, world: World) -> ModelSource:
    """The model at infer.model_path. Collective."""
    path = Path(config.infer.model_path or "").expanduser()
    given = config.infer.tokenizer_path
    tokenizer = None if given == config.infer.model_path else given
    source = world.run_on_all_ranks(lambda: _folder_source(path, config, tokenizer))
    if source is not None:
        return source
    trained = find_trained(path, world)
    run = trained.config
    if run.data.task.head != "tokens":
        raise ValueError(f"infer.model_path: {path} is of a classifier, which generates no text")
    if tokenizer is not None:
        run = replace(run, model=replace(run.model, tokenizer_path=tokenizer))
    of_chats = run.data.task.holds_chats
    return ModelSource(run, trained, run.data.chat_template if of_chats else "default", of_chats)


def _folder_source(path: Path, config: Config, tokenizer: str | None) -> ModelSource | None:
    """The Hugging Face or adapter folder that `path` is, or that it contains as an output folder; None if it is an
    output folder without one, or a checkpoint."""
    if not path.exists():
        raise ValueError(
            f"infer.model_path: {path} is not there; give a folder, or a name on the Hugging Face hub (org/name)"
        )
    for folder in (path, path / "hf" / "final"):
        if is_adapter_folder(folder):
            return _adapted(folder, config, tokenizer)
        if (folder / "config.json").is_file():
            _require_language_model(folder)
            return ModelSource(Config(model=ModelConfig(model_path=str(folder), tokenizer_path=tokenizer)))
    if not is_of_run(path):
        raise ValueError(
            f"infer.model_path: {path} is neither a Hugging Face folder (with its config.json) nor an adapter nor an "
            "output folder of a run (with its config.yaml) nor a checkpoint in one"
        )
    return None


def _require_language_model(folder: Path) -> None:
    """Raise ValueError if the config.json in `folder` is of a part of a diffusers pipeline."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # building the model reports this
        return
    if isinstance(content, dict) and "_class_name" in content and "model_type" not in content:
        raise ValueError(
            f"infer.model_path: {folder} is of {content['_class_name']}, which writes no text and draws by itself "
            "nothing; models that use it name it in model.decoders, or have it as a part of their folder"
        )


def _adapted(folder: Path, config: Config, tokenizer: str | None) -> ModelSource:
    """The adapter in `folder` on model.model_path, or else on the base that it names."""
    base = config.model.model_path or base_path(folder)
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    if tokenizer == config.model.model_path and "infer.tokenizer_path" not in config.explicit:
        tokenizer = None  # only the default; the adapter's own tokenizer knows how its chats are rendered
    beside = read_composed(folder)
    model = ModelConfig(model_path=base, tokenizer_path=tokenizer or own, adapter_path=str(folder), **beside)
    return ModelSource(Config(model=model, train=TrainConfig(architecture="lora")))


def data_of(asked: Config, source: ModelSource) -> DataConfig:
    """The settings for reading rows: those of the model's training, overridden by what the user set."""
    names = [name.removeprefix("data.") for name in asked.explicit if name.startswith("data.")]
    return replace(source.config.data, **{name: getattr(asked.data, name) for name in names})


@contextmanager
def named_as_infer() -> Iterator[None]:
    """Make errors about a model's files name the arguments of `infer.*` that the paths came from."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name in ("model.model_path", "model.config_path", "model.adapter_path", "train.load_checkpoint_path"):
            text = text.replace(name, "infer.model_path")
        text = text.replace("model.tokenizer_path", "infer.tokenizer_path")
        raise ValueError(text) from error
