"""Models by hub name: which files are downloaded, and that train, infer and adapters accept names like folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import run_ranks
from tests.hub import HubServer, use_hub
from tests.infer.models import ONE, write_model
from tests.train.runs import QUICKSTART, tiny_config
from tutti.checkpoint.adapter import base_path
from tutti.checkpoint.hub import pin_model, with_local_paths
from tutti.config import Config, InferConfig, ModelConfig
from tutti.config.yamlfile import to_yaml
from tutti.core.device import pick_device
from tutti.core.dist import init_world
from tutti.core.hub import Repo
from tutti.infer.load import load_model
from tutti.train.run import train

SMALL = {
    name: b"{}" + b" " * number  # files of the same content would be downloaded once
    for number, name in enumerate(
        ("config.json", "generation_config.json", "tokenizer.json", "merges.txt", "tokenizer.model",
         "chat_template.jinja", "additional_chat_templates/tools.jinja")
    )
}  # fmt: skip
NEEDLESS = {
    name: name.encode()
    for name in ("README.md", "modeling_own.py", "model.gguf", "tf_model.h5", "onnx/model.onnx", "onnx/config.json",
                 "LICENSE.txt", "original/params.json")
}  # fmt: skip
INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDS = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
SHARDED = {"model.safetensors.index.json": INDEX.encode(), **SHARDS}
SINGLE = {"model.safetensors": b"1"}
OLD = {"pytorch_model.bin": b"1"}
OLD_INDEX = {"pytorch_model.bin.index.json": b"{}"}
ADAPTER = {"adapter_config.json": b"{ }", "adapter_model.safetensors": b"1"}


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (SHARDED | {"consolidated.safetensors": b"12"} | OLD | OLD_INDEX, SHARDED),
        (SINGLE | OLD, SINGLE),
        (OLD, OLD),
        (ADAPTER, ADAPTER),
    ],
    ids=["sharded", "single", "bin", "adapter"],
)
def test_the_files_that_are_read_are_downloaded(
    hub: HubServer, held: dict[str, bytes], wanted: dict[str, bytes]
) -> None:
    hub.add("models/org/tiny", SMALL | NEEDLESS | held)
    found = pin_model(Repo("model", "org/tiny", "main", "model.model_path"), weights=True)
    assert hub.downloads() == sorted(SMALL | wanted)
    assert sorted(found.files) == hub.downloads()


def test_without_weights_none_are_downloaded(hub: HubServer) -> None:
    hub.add("models/org/tiny", SMALL | NEEDLESS | SHARDED)
    pin_model(Repo("model", "org/tiny", "main", "model.config_path"), weights=False)
    assert hub.downloads() == sorted([*SMALL, "model.safetensors.index.json"])


def test_weights_of_another_format_alone_are_refused(hub: HubServer) -> None:
    hub.add("models/org/tiny", SMALL | NEEDLESS)
    with pytest.raises(ValueError, match=r"model.model_path: org/tiny has no weights in .*; it has model.gguf"):
        pin_model(Repo("model", "org/tiny", "main", "model.model_path"), weights=True)


def test_each_argument_takes_a_name(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {name: hub.add(f"models/org/{name}", SMALL | SINGLE | {"config.json": name.encode()}) for name in "abcd"}
    other = hub.add("models/org/a", SMALL | SINGLE, revision="v2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "d").mkdir(parents=True)

    def local(argument: str, name: str) -> str:
        group, _, leaf = argument.partition(".")
        config = Config()
        config = replace(config, **{group: replace(getattr(config, group), **{leaf: name})})  # type: ignore[arg-type]
        return getattr(getattr(with_local_paths(config, ONE), group), leaf)

    folder = f"{tmp_path}/home/hub/models--org--a/snapshots/{commits['a']}"
    weights = Path(folder, "model.safetensors")
    for argument in ("model.config_path", "model.tokenizer_path", "infer.tokenizer_path"):
        assert local(argument, "org/a") == folder
    assert not weights.exists()
    for argument in ("model.model_path", "model.adapter_path", "infer.model_path"):
        assert local(argument, "org/a") == folder
        assert weights.exists()
        weights.unlink()
    assert local("model.model_path", "org/a@v2").endswith(other)
    assert local("model.model_path", "org/d") == "org/d", "a folder of that name wins"
    assert local("model.model_path", str(tmp_path)) == str(tmp_path)


def test_an_encoder_takes_a_name_and_an_export_of_a_composed_model_comes_whole(hub: HubServer, tmp_path: Path) -> None:
    parts = {"omni.yaml": b"x", "encoders/image/config.json": b"{}", "encoders/image/model.safetensors": b"1"}
    hub.add("models/org/composed", SMALL | SINGLE | parts)
    tower = hub.add("models/org/tower", SMALL | SINGLE)
    encoders = {"image": {"model_path": "org/tower", "pool": 2}}
    config = Config(model=ModelConfig(model_path="org/composed", encoders=encoders))
    found = with_local_paths(config, ONE).model
    assert {name for name in parts if Path(found.model_path or "", name).is_file()} == set(parts)
    folder = Path(found.encoders["image"]["model_path"])
    assert folder.name == tower and (folder / "model.safetensors").is_file()
    assert found.encoders["image"]["pool"] == 2


def named(model_path: str) -> Config:
    return Config(model=ModelConfig(model_path=model_path))


def _ranks_find(endpoint: str, home: str, homes_differ: bool) -> Any:
    """On one of two ranks, as if each were on a separate node: the folder of org/tiny and its contents."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, endpoint, Path(home, str(rank) if homes_differ else "home"))
        world = init_world(pick_device("cpu"))
        config = with_local_paths(named("org/tiny"), world)
        folder = Path(config.model.model_path or "")
        return str(folder), sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("homes_differ", [False, True], ids=["one cache", "a cache each"])
def test_a_file_is_downloaded_once_for_every_cache(hub: HubServer, tmp_path: Path, homes_differ: bool) -> None:
    hub.add("models/org/tiny", {"config.json": b"{}", "model.safetensors": b"1"})
    found = run_ranks(2, _ranks_find, hub.endpoint, str(tmp_path), homes_differ)
    assert [names for _, names in found] == [["config.json", "model.safetensors"]] * 2
    assert hub.downloads() == sorted(["config.json", "model.safetensors"] * (2 if homes_differ else 1))


def _ranks_fail(endpoint: str, home: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        use_hub(patch, endpoint, Path(home))
        world = init_world(pick_device("cpu"))
        with pytest.raises(ValueError) as caught:
            with_local_paths(named("org/none"), world)
        return str(caught.value)


def test_an_error_of_rank_0_reaches_all_ranks(hub: HubServer, tmp_path: Path) -> None:
    first, second = run_ranks(2, _ranks_fail, hub.endpoint, str(tmp_path))
    assert first == second
    assert "model.model_path: org/none is not there" in first


def test_code_in_a_repository_is_never_run(hub: HubServer, tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    code = b"raise SystemExit('this code was run')"
    hub.add("models/org/own", {"config.json": json.dumps(config).encode(), "own.py": code, **SINGLE})
    with pytest.raises(ValueError, match=r"model.model_path: .*config.json is not a configuration that can be used"):
        train(tiny_config(tmp_path, **{"model.model_path": "org/own"}))
    assert "own.py" not in hub.downloads()


def test_an_adapter_names_its_base_on_the_hub(hub: HubServer, tmp_path: Path) -> None:
    """Train an adapter on a hub model, publish it, and generate with it: its base is found by name and commit."""
    commit = hub.add("models/org/base", Path(write_model(tmp_path / "base")))
    changes = {"model.model_path": "org/base", "model.tokenizer_path": None, "train.architecture": "lora"}
    config = tiny_config(tmp_path, **changes, **{"train.max_steps": 1, "train.save_hf_weights": True})
    train(config)
    assert "model_path: org/base" in (tmp_path / "out" / "config.yaml").read_text()
    final = tmp_path / "out" / "hf" / "final"
    assert base_path(final) == f"org/base@{commit}"
    hub.add("models/org/adapter", final)
    hub.add("models/org/base", {"config.json": b"the branch has moved"})
    loaded = load_model(Config(infer=InferConfig(model_path="org/adapter")), ONE)
    assert loaded.model.config.model_type == "qwen3"


def test_the_command_takes_names_and_then_needs_no_network(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that know the hub only from the environment; then one process, offline, with the same cache."""
    hub.add("models/org/tiny", Path(write_model(tmp_path / "model")))
    hub.add("datasets/org/chats", {"data/train-00000-of-00001.jsonl": (QUICKSTART / "chat_eval.jsonl").read_bytes()})
    hub.private |= {"models/org/tiny", "datasets/org/chats"}
    names = {"model.model_path": "org/tiny", "model.tokenizer_path": None, "data.train_path": "org/chats"}
    config = tiny_config(tmp_path, **names, **{"train.max_steps": 1})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}
    command = [sys.executable, "-m", "tutti", "train", str(tmp_path / "run.yaml"), "--nproc", "2"]
    command += ["--train.output_dir", str(tmp_path / "online"), "--train.data_parallel_mode", "fsdp2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Fetching" not in done.stderr, "a progress bar belongs on a terminal"
    expected = ["config.json", "data/train-00000-of-00001.jsonl", "generation_config.json", "model.safetensors"]
    assert hub.downloads() == sorted([*expected, "tokenizer.json", "tokenizer_config.json"])
    asked = len(hub.requests)
    use_hub(monkeypatch, hub.endpoint, tmp_path / "home", offline=True)
    train(config)
    assert len(hub.requests) == asked
    first, second = (json.loads((tmp_path / out / "metrics.jsonl").read_text()) for out in ("online", "out"))
    assert first["samples"] == second["samples"]
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
