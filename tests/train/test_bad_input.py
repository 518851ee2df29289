"""Bad input: one clear error that says what to change, the same on every rank, before anything is trained."""

import json
from pathlib import Path

import pytest

from tests.harness import run_ranks
from tests.train.runs import QUICKSTART, TINY, tiny_config

GOOD = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]}


def rows(*values) -> str:
    return "".join((value if isinstance(value, str) else json.dumps(value)) + "\n" for value in values)


def masked(row):
    return {"messages": [message | {"loss_mask": 0} for message in row["messages"]]}


def with_role(role):
    return {"messages": [{"role": role, "content": "Hello"}, GOOD["messages"][1]]}


CLASSES = {"data.data_type": "classification", "model.num_labels": 3}
CASES = {
    "missing file": ("train.jsonl", None, {}, ["train.jsonl"]),
    "empty data": ("train.jsonl", "", {}, ["train.jsonl", "empty"]),
    "malformed row": ("train.jsonl", rows(GOOD, '{"messages": [', GOOD), {}, ["train.jsonl", "2"]),
    "wrong column": ("train.jsonl", rows({"dialogue": "hi"}), {}, ["train.jsonl", "messages", "dialogue"]),
    "unknown role": ("train.jsonl", rows(GOOD, with_role("wizard")), {}, ["wizard", "train.jsonl"]),
    "all labels masked": ("train.jsonl", rows(*[masked(GOOD)] * 4), {}, ["no trained token"]),
    "unknown kind of file": ("train.xyz", "hello", {}, ["train.xyz", "jsonl"]),
    "tokenizer larger than embedding": (
        "train.jsonl", rows(*[GOOD] * 20), {"model": {"vocab_size": 1000}}, ["2048", "1000"],
    ),
    "too little data": ("train.jsonl", rows(GOOD), {}, ["data.drop_last"]),
    "no such class": ("train.jsonl", rows({"text": "a", "label": 5}), CLASSES, ["label 5", "0 to 2"]),
}  # fmt: skip


def error_of(config) -> str:
    from tests.train.runs import train_quietly

    try:
        train_quietly(config)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("case", CASES)
def test_bad_data_and_models(tmp_path, case):
    name, text, changes, words = CASES[case]
    if text is not None:
        (tmp_path / name).write_text(text)
    model = changes.get("model", {})
    values = {key: value for key, value in changes.items() if key != "model"}
    config = tiny_config(tmp_path, world=2, **{"data.train_path": str(tmp_path / name), **values})
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | model))
    errors = run_ranks(2, error_of, config, timeout=60)
    for error in errors:
        for word in words:
            assert word in error, f"{word!r} is not in: {error}"
        assert len(error.splitlines()) == 1, f"more than one line: {error}"
    assert errors[0] == errors[1]


def error_of_own(configs) -> str:
    import os

    return error_of(configs[int(os.environ["RANK"])])


def test_ranks_that_were_started_with_other_arguments(tmp_path):
    """Replicas with different learning rates would silently diverge; ranks with different layouts would hang."""
    same = {"data.train_path": str(QUICKSTART / "chat.jsonl")}
    ours = tiny_config(tmp_path, world=2, **same)
    changes = {"train.lr": 0.5, "train.weight_decay": 0.1, "train.load_checkpoint_path": "auto"}
    errors = run_ranks(2, error_of_own, [ours, tiny_config(tmp_path, world=2, **same, **changes)], timeout=60)
    assert errors[0] == errors[1]
    assert "rank 1 was started with other arguments than rank 0" in errors[0]
    for text in (
        "train.lr 0.5 instead of 0.01",
        "train.weight_decay 0.1 instead of 0.0",
        "train.load_checkpoint_path True",
    ):
        assert text in errors[0]


def test_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    config = tiny_config(tmp_path, world=2, **{"train.output_dir": str(tmp_path / "file" / "out")})
    for error in run_ranks(2, error_of, config):
        assert "train.output_dir" in error and "cannot be written" in error


def test_wrong_model_for_a_checkpoint_is_told_by_name(tmp_path):
    from tests.train.runs import run

    first = tiny_config(tmp_path, **{"train.save_steps": 1, "train.max_steps": 1})
    run(first)
    again = tiny_config(tmp_path, **{"train.load_checkpoint_path": "auto"})
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 1}))
    (error,) = run_ranks(1, error_of, again)
    assert "layers.1" in error


def test_data_that_changed_is_not_resumed(tmp_path):
    from tests.train.runs import run

    data = tmp_path / "chat.jsonl"
    lines = (QUICKSTART / "chat.jsonl").read_text().splitlines(keepends=True)
    data.write_text("".join(lines[:300]))
    changes = {"data.train_path": str(data), "train.save_steps": 1, "train.max_steps": 1}
    run(tiny_config(tmp_path, **changes))
    data.write_text("".join(lines[1:301]))
    (error,) = run_ranks(1, error_of, tiny_config(tmp_path, **changes, **{"train.load_checkpoint_path": "auto"}))
    assert "data" in error and Path(data).exists()
