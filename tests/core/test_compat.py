"""Private parts of torch and transformers: they exist, are used from one place, and errors name the versions."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tutti.core import compat

ROOT = Path(__file__).parents[2]
PUBLIC = {"transformers.utils.logging", "transformers.modeling_outputs"}


@pytest.mark.parametrize("name", sorted(compat._PLACES))
def test_it_is_there(name: str) -> None:
    assert getattr(compat, name) is not None


def inner_imports(path: Path) -> Iterator[str]:
    """The imports of a module from torch and transformers that are private or lie deep, as path:line: module.name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{item.name}" for item in node.names]
        elif isinstance(node, ast.Import):
            found = [item.name for item in node.names]
        elif isinstance(node, ast.Attribute) and node.attr in ("_C", "_model_mapping", "torch_attn"):
            found = [f"torch.{node.attr}"] if node.attr.startswith("_") else ["torch._ops"]
        else:
            continue
        for name in found:
            package, *parts = name.split(".")
            private = any(part.startswith("_") and not part.startswith("__") for part in parts)
            deep = package == "transformers" and len(parts) > 1 and name.rpartition(".")[0] not in PUBLIC
            if package in ("torch", "transformers") and (private or deep):
                yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def test_inner_parts_are_imported_in_one_place() -> None:
    files = [path for path in (ROOT / "tutti").rglob("*.py") if path.name != "compat.py"]
    assert len(files) > 50
    assert [place for path in files for place in inner_imports(path)] == []


def test_every_place_is_used() -> None:
    text = "\n".join(path.read_text() for path in (ROOT / "tutti").rglob("*.py") if path.name != "compat.py")
    assert [name for name in compat._PLACES if not re.search(rf"\b{name}\b", text)] == []


def test_what_has_gone_names_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compat._PLACES, "gone", "torch.utils._pytree:no_such_thing")
    monkeypatch.setitem(compat._PLACES, "moved", "transformers.no_such_module:thing")
    oldest, newest = compat.TESTED["torch"]
    with pytest.raises(ImportError, match=rf"_pytree has no no_such_thing in torch .* {oldest} to {newest}:"):
        from tutti.core.compat import gone  # noqa: F401
    with pytest.raises(ImportError, match=r"no_such_module has no thing in transformers .*: install one of"):
        from tutti.core.compat import moved  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'misspelt'"):
        from tutti.core.compat import misspelt  # noqa: F401
    with pytest.raises(ImportError, match=r"there is no Auto._model_mapping in transformers .*; Tutti is tested with"):
        compat.model_mapping(SimpleNamespace(__name__="Auto"))


def test_other_versions_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compat.untested() == []
    found = {"torch": "2.15.3+cu132", "torchvision": "0.29.0", "transformers": "5.25.0.dev0"}
    monkeypatch.setattr(compat, "version", found.__getitem__)
    oldest, newest = compat.TESTED["transformers"]
    assert compat.untested() == [
        f"transformers 5.25.0.dev0 is untested; Tutti is tested with transformers {oldest} to {newest}: install one of "
        "these"
    ]
    found["torch"] = "2.9.1"
    assert len(compat.untested()) == 2


def test_what_is_installed_is_what_is_tested() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = {item.split(">=")[0]: item for item in project["dependencies"]}
    minors = {name: [".".join(text.split(".")[:2]) for text in pair] for name, pair in compat.TESTED.items()}
    major, minor = map(int, minors["transformers"][1].split("."))
    for name in ("torch", "torchvision"):
        assert required[name] == f"{name}>={minors[name][0]}"
    assert required["transformers"] == f"transformers>={minors['transformers'][0]},<{major}.{minor + 1}"
    shown = subprocess.run(
        [sys.executable, "-m", "tutti.core.compat", "oldest"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert shown == [f"{name}=={pair[0]}" for name, pair in compat.TESTED.items()]
