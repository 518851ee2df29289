"""The wheel, installed into a separate environment: the command, and all files that it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "tutti", source / "tutti", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_it_holds_every_file_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    files = [path for path in (ROOT / "tutti").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sorted(names) == sorted(path.relative_to(ROOT).as_posix() for path in files)
    assert wheel.name.startswith("tutti_train-")


def test_it_trains_where_nothing_else_of_the_project_is(wheel: Path, tmp_path: Path) -> None:
    """Its dependencies are those of this process: only the wheel is installed."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*install, str(wheel)], env=environment, check=True, capture_output=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*command: str, folder: Path = tmp_path) -> str:
        settings: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 240}
        done = subprocess.run(command, cwd=folder, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import tutti, importlib.metadata as m; print(tutti.__file__, tutti.__version__, m.version('tutti-train'))"
    file, version, of_wheel = run(str(python), "-c", where).split()
    assert Path(file).is_relative_to(site)
    tutti = str(python.with_name("tutti"))
    assert run(tutti, "--version").strip() == version == of_wheel
    run(tutti, "init", "songs")
    run(tutti, "train", "config.yaml", "--train.max_steps", "1", "--train.save_epochs", "0", folder=tmp_path / "songs")
    (metrics,) = (tmp_path / "songs").rglob("metrics.jsonl")
    assert json.loads(metrics.read_text().splitlines()[0])["step"] == 1
    assert "</script>" in metrics.with_name("report.html").read_text()
