"""The project that `tutti init` writes is checked and trained as it is."""

import json
from pathlib import Path

import pytest
import yaml

from tests.harness import run_ranks
from tutti.cli import main
from tutti.config.load import load


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "songs"]) == 0
    out = capsys.readouterr().out
    assert "songs/config.yaml" in out and "next: cd songs && tutti train config.yaml" in out
    monkeypatch.chdir(tmp_path / "songs")
    return tmp_path / "songs"


def test_it_is_small_commented_and_whole(project: Path) -> None:
    config = load(["config.yaml"])
    for path in (
        config.model.config_path,
        config.data.train_path,
        config.data.eval_path,
        config.train.sample_prompts_path,
    ):
        assert Path(str(path)).exists(), path
    assert len((project / "README.md").read_text().splitlines()) <= 10
    lines = (project / "config.yaml").read_text().splitlines()
    assert sum("#" in line for line in lines) > len(lines) / 2
    assert sum(file.stat().st_size for file in project.rglob("*") if file.is_file()) < 100_000
    asked = {
        tuple(message["content"] for message in json.loads(line)["messages"])
        for line in (project / "data/train.jsonl").open()
    }
    held = {
        tuple(message["content"] for message in json.loads(line)["messages"])
        for line in (project / "data/eval.jsonl").open()
    }
    assert len(asked) > 100 and held and not asked & held


def test_it_is_checked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "config.yaml"]) == 0
    assert not (project / "runs").exists()


def test_it_trains(project: Path) -> None:
    run_ranks(1, train_two_steps, str(project))
    lines = [json.loads(line) for line in (project / "runs/first/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert (project / "runs/first/hf/final/model.safetensors").exists()
    shown = json.loads((project / "runs/first/run.json").read_text())["texts"]
    prompts = (project / "prompts.txt").read_text().splitlines()
    assert [text["prompt"] for text in shown] == 2 * prompts, "before training and after it"


def train_two_steps(folder: str) -> None:
    import os

    from tests.train.runs import train_quietly
    from tutti.config.layout import resolve_sizes

    os.chdir(folder)
    train_quietly(resolve_sizes(load(["config.yaml", "train.max_steps=2", "train.num_train_epochs=1"]), 1))


def test_a_folder_with_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("x")
    assert main(["init", str(tmp_path)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["init"]) == 2
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mine.txt"]


def test_the_readme_names_commands_that_exist(project: Path) -> None:
    readme = (project / "README.md").read_text()
    assert "tutti train config.yaml" in readme and "tutti check config.yaml" in readme
    assert yaml.safe_load((project / "config.yaml").read_text())["train"]["output_dir"] in readme
