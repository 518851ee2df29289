"""The arguments are those of the contract, row by row: names, order, types, sets of values and defaults."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tutti.config import ARGUMENTS, Config, DataConfig, InferConfig, ModelConfig, TrainConfig
from tutti.config.docs import as_lines, as_markdown, select
from tutti.config.tasks import TASKS

REFERENCE = Path(__file__).with_name("reference.md")
ROOT = Path(__file__).parents[2]


REFERENCE_TASKS = ("plaintext", "conversation", "classification")
ADDED_VALUES = {
    "data.data_type": tuple(name for name in TASKS if name not in REFERENCE_TASKS),
    "train.optimizer": ("adamw_8bit", "muon"),
}
"""Statuses of an argument beside those of the contract."""


class Row(NamedTuple):
    name: str
    type: str
    description: str
    default: str


def reference() -> list[Row]:
    rows = []
    for line in REFERENCE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 4 and re.match(r"(model|data|train|infer)\.\w+$", cells[0]):
            rows.append(Row(*cells))
    return rows


def listed() -> list[dict[str, Any]]:
    """The output of `tutti args --json`."""
    done = subprocess.run(
        [sys.executable, "-m", "tutti", "args", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


OURS = listed()
CONTRACT = [row for row in OURS if not row["added"]]
PAIRS = list(zip(reference(), CONTRACT, strict=True))


def test_the_reference_has_107_rows_and_comes_first() -> None:
    assert len(reference()) == 107
    assert [row["name"] for row in OURS[:107]] == [row.name for row in reference()]
    assert all(row["added"] for row in OURS[107:])


@pytest.mark.parametrize(("row", "ours"), PAIRS, ids=[row.name for row, _ in PAIRS])
def test_type(row: Row, ours: dict[str, Any]) -> None:
    values = re.findall(r'"([^"]+)"', row.type)
    if row.name == "train.init_device":
        values = re.findall(r'"([^"]+)"', row.description)[:4]
    assert sorted(ours["values"]) == sorted([*values, *ADDED_VALUES.get(row.name, ())])
    assert ours["type"].partition(":")[0] == row.type.partition(":")[0].replace('Literal["full", "lora"]', "str")
    # Users may also name columns and datasets of their own.
    assert ours["open"] == (not values or row.name in ("data.text_keys", "data.datasets_type"))


@pytest.mark.parametrize(("row", "ours"), PAIRS, ids=[row.name for row, _ in PAIRS])
def test_default(row: Row, ours: dict[str, Any]) -> None:
    text = row.default.removesuffix("(TODO)").strip()
    if ours["type"] in ("int", "float") and text[0].isdigit():
        assert ours["default"] == float(text.replace(",", "").replace(" ", ""))
    else:
        words = {"None": None, "True": True, "False": False, "[]": [], "{}": {}}
        assert ours["default"] == words.get(text, text)


@pytest.mark.parametrize("row", reference(), ids=lambda row: row.name)
def test_the_class_has_the_documented_default(row: Row) -> None:
    """The documented default values are the attributes' defaults, not only the table's."""
    argument = ARGUMENTS[row.name]
    if argument.shown != argument.default:
        assert argument.default is None
        assert row.name == "data.text_keys" or "." in row.default or row.default == "Required"


@pytest.mark.parametrize("cls", [Config, ModelConfig, DataConfig, TrainConfig, InferConfig])
def test_classes_are_frozen(cls: type) -> None:
    with pytest.raises(AttributeError):
        setattr(cls(), next(iter(cls.__dataclass_fields__)), 1)  # type: ignore[attr-defined]


def test_every_argument_is_documented_in_one_line() -> None:
    for argument in ARGUMENTS.values():
        assert argument.doc.endswith("."), argument.name
        assert "\n" not in argument.doc
        assert "|" not in argument.doc, "would break the table"


def test_the_page_is_in_sync() -> None:
    page = (ROOT / "docs/arguments.md").read_text()
    assert page == as_markdown(), "run `tutti args --markdown > docs/arguments.md`"
    assert all(f"| `{name}` |" in page for name in ARGUMENTS)


def test_select_by_prefix_of_the_whole_name_or_of_the_leaf() -> None:
    assert [argument.name for argument in select("train.lr_w")] == ["train.lr_warmup_ratio"]
    assert [argument.name for argument in select("tokenizer")] == ["model.tokenizer_path", "infer.tokenizer_path"]
    assert {argument.group for argument in select("model")} == {"model"}
    assert select("nothing") == []


def test_lines_are_columns() -> None:
    lines = as_lines(select("train.wandb")).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["train.wandb_project", "str", "VeOmni"],
        ["train.wandb_name", "str", "none"],
        ["train.wandb_id", "str", "none"],
    ]
    assert len({line.index("str") for line in lines}) == 1
