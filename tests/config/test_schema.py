"""The JSON Schema of configurations accepts what the loader accepts, and rejects what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_configs import RECIPES
from tutti.cli import main
from tutti.config import Config
from tutti.config.docs import as_schema
from tutti.config.yamlfile import to_yaml

SCHEMA = json.loads(as_schema())
_TYPES = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "object": dict, "array": list,
    "null": type(None),
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], place: str = "") -> list[str]:
    """The paths in `value` that violate `schema`, for the keywords that our schema uses."""
    unknown = set(schema) - {
        "$schema", "title", "description", "default", "examples", "type", "properties", "additionalProperties", "items",
        "enum", "anyOf", "minimum", "maximum",
    }  # fmt: skip
    assert not unknown, unknown
    if "anyOf" in schema and all(problems(value, each, place) for each in schema["anyOf"]):
        return [place]
    if "enum" in schema and value not in schema["enum"]:
        return [place]
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, _TYPES[kind]) and (kind == "boolean") == isinstance(value, bool) for kind in kinds):
        return [place]
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return [place]
    found = []
    for key, item in value.items() if isinstance(value, dict) else ():
        if key in schema.get("properties", {}):
            found += problems(item, schema["properties"][key], f"{place}.{key}")
        elif schema.get("additionalProperties") is False:
            found.append(f"{place}.{key}")
    for item in value if isinstance(value, list) else ():
        found += problems(item, schema.get("items", {}), place)
    return found


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_pass(recipe: Path) -> None:
    assert problems(yaml.safe_load(recipe.read_text()), SCHEMA) == []


def test_what_is_written_back_passes() -> None:
    assert problems(yaml.safe_load(to_yaml(Config())), SCHEMA) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("{trian: {}}", ".trian"),
        ("{train: {lrr: 1.0}}", ".train.lrr"),
        ("{train: {lr: fast}}", ".train.lr"),
        ("{train: {lr: -1.0}}", ".train.lr"),
        ("{train: {dyn_bsz: 3}}", ".train.dyn_bsz"),
        ("{train: {optimizer: adam}}", ".train.optimizer"),
        ("{train: {no_decay_params: [1]}}", ".train.no_decay_params"),
        ("{infer: {top_p: 2}}", ".infer.top_p"),
        ("[]", ""),
    ],
)
def test_what_the_loader_refuses_is_marked(text: str, place: str) -> None:
    assert problems(yaml.safe_load(text), SCHEMA) == [place]


@pytest.mark.parametrize("text", ["{train: {max_steps: none}}", "{train: }", "{model: {encoders: {image: {a: 1}}}}"])
def test_what_the_loader_takes_is_not(text: str) -> None:
    assert problems(yaml.safe_load(text), SCHEMA) == []


def test_a_new_project_names_its_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "songs"]) == 0
    first, *_ = (tmp_path / "songs/config.yaml").read_text().splitlines()
    name = first.removeprefix("# yaml-language-server: $schema=")
    schema = json.loads((tmp_path / "songs" / name).read_text())
    assert problems(yaml.safe_load((tmp_path / "songs/config.yaml").read_text()), schema) == []


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["args", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
