import errno
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.checkpoint.tiny import (
    Killed,
    Tiny,
    assert_same,
    build,
    checkpointer,
    everything,
    flip,
    forge,
    names,
    raising,
    saved,
    train,
)
from tests.harness import run_ranks
from tutti.checkpoint import dcp, manager, manifest
from tutti.checkpoint.manager import Checkpointer, find_checkpoint, preview_resume, read_model
from tutti.checkpoint.state import create_optimizer_state, model_tensors
from tutti.config.load import from_dict, to_yaml
from tutti.core.dist import init_world
from tutti.train.adamw import AnyPrecisionAdamW


@pytest.mark.parametrize("layout", ["plain", "shard", "copies"])
@pytest.mark.parametrize("kind", ["adamw", "bf16"])
def test_resumes_bit_equal(tmp_path, one_rank, layout, kind):
    model, optimizer = build(layout, kind)
    train(model, optimizer, 3)
    keeper = checkpointer(tmp_path, one_rank)
    state = {"step": 3, "epoch": 0, "data": {"position": [1, 2], "note": "ü"}, "loss": 0.1}
    keeper.save(3, model, optimizer, state)
    at_save = everything(model, optimizer)
    drawn = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    train(model, optimizer, 2)

    again, resumed = build(layout, kind, seed=1, groups=True)
    torch.manual_seed(5)
    assert checkpointer(tmp_path, one_rank).resume("auto", again, resumed) == state
    assert_same(everything(again, resumed), at_save)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == drawn
    train(again, resumed, 2)
    assert_same(everything(again, resumed), everything(model, optimizer))
    assert resumed.param_groups[0]["lr"] == 1e-2


def test_a_checkpoint_describes_itself(tmp_path, one_rank):
    _, _, keeper = saved(tmp_path, one_rank, 1, facts={"layout": {"shard": 1}, "config": "abc"})
    folder = tmp_path / "checkpoints/global_step_1"
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step_1\n"
    content = json.loads((folder / "manifest.json").read_text())
    assert content["step"] == 1
    assert content["facts"]["layout"] == {"shard": 1}
    assert content["facts"]["versions"]["torch"] == torch.__version__
    assert set(content["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert str(tmp_path).encode() not in (folder / ".metadata").read_bytes()
    assert keeper.latest() == folder


def test_another_compute_dtype_than_before_is_told(tmp_path, one_rank, warnings):
    saved(tmp_path, one_rank, 1, facts={"compute_dtype": "bfloat16"})
    for path in ("auto", str(tmp_path), str(tmp_path / "checkpoints/global_step_1")):
        assert preview_resume(path, tmp_path).facts["compute_dtype"] == "bfloat16"
    for dtype in ("bfloat16", "float32"):
        warnings.clear()
        checkpointer(tmp_path, one_rank, facts={"compute_dtype": dtype}).resume("auto", *build("plain"))
        told = [record.getMessage() for record in warnings.records if "computed in bfloat16" in record.getMessage()]
        assert len(told) == (dtype == "float32")
    assert preview_resume("auto", tmp_path / "none") == preview_resume(None, tmp_path) == ({}, {})


def test_tied_once_and_buffers(tmp_path, one_rank):
    saved(tmp_path, one_rank, 1)
    index = dcp.read_index(tmp_path / "checkpoints/global_step_1").state_dict_metadata
    stored = {name for name in index if name.startswith("model.")}
    assert "model.embed.weight" in stored and "model.head.weight" not in stored
    assert "model.count" in stored and "model.scratch" not in stored
    assert "optimizer.unused.exp_avg" not in index


def save_on_ranks(root: Path, layout: str, save_async: bool) -> dict[str, np.ndarray]:
    dist = init_world(torch.device("cpu"))
    model, optimizer = build(layout)
    train(model, optimizer, 2)
    keeper = checkpointer(root, dist, save_async=save_async)
    torch.manual_seed(dist.rank)
    keeper.save(2, model, optimizer, {"step": 2})
    before = everything(model, optimizer)
    if save_async:
        train(model, optimizer, 1)
    keeper.wait()
    return before


def load_on_ranks(root: Path, layout: str) -> tuple[dict[str, np.ndarray], list[float]]:
    dist = init_world(torch.device("cpu"))
    model, optimizer = build(layout, seed=7)
    keeper = checkpointer(root, dist)
    draws = []
    for _ in range(2):
        assert keeper.resume(str(root), model, optimizer) == {"step": 2}
        draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1]
    return everything(model, optimizer), draws[0]


@pytest.mark.parametrize(
    ("source", "source_ranks", "save_async", "target", "target_ranks"),
    [
        ("shard", 2, False, "plain", 1),
        ("shard", 1, False, "shard", 2),
        ("shard", 2, True, "shard", 3),
        ("copies", 2, True, "shard", 1),
        ("shard", 1, False, "hybrid", 4),
    ],
)
def test_other_layouts_read_it(tmp_path, source, source_ranks, save_async, target, target_ranks):
    written = run_ranks(source_ranks, save_on_ranks, tmp_path, source, save_async)
    read = run_ranks(target_ranks, load_on_ranks, tmp_path, target)
    for tensors, _ in read:
        assert_same(tensors, written[0])
    assert len({tuple(draw) for _, draw in read}) == target_ranks, "every rank has random numbers of its own"


def test_every_rank_gets_its_own_generator_back(tmp_path):
    run_ranks(2, save_on_ranks, tmp_path, "shard", False)
    for rank, (_, draw) in enumerate(run_ranks(2, load_on_ranks, tmp_path, "shard")):
        torch.manual_seed(rank)
        assert draw == torch.rand(2).tolist()


def test_async_save_is_of_the_moment_it_was_asked_for(tmp_path, one_rank, monkeypatch):
    may_write = threading.Event()
    write = dcp.write
    monkeypatch.setattr(dcp, "write", lambda *args: may_write.wait(30) and write(*args))
    model, optimizer = build("shard")
    train(model, optimizer, 2)
    keeper = checkpointer(tmp_path, one_rank, save_async=True)
    keeper.save(2, model, optimizer, {})
    asked = everything(model, optimizer)
    train(model, optimizer, 3)
    assert not (tmp_path / "checkpoints/global_step_2").exists()
    may_write.set()
    keeper.wait()
    again, resumed = build("shard", seed=1)
    keeper.resume("auto", again, resumed)
    assert_same(everything(again, resumed), asked)


def test_async_saves_share_their_memory(tmp_path, one_rank):
    model, optimizer = build("plain")
    keeper = checkpointer(tmp_path, one_rank, save_async=True)
    places = []
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        keeper.save(step, model, optimizer, {"step": step})
        places.append({name: copy.data_ptr() for name, copy in keeper._copies.items()})
    keeper.wait()
    assert places[0] == places[1] == places[2]
    again, resumed = build("plain", seed=1)
    keeper.resume("auto", again, resumed)
    assert_same(everything(again, resumed), everything(model, optimizer))


@pytest.mark.skipif(not os.environ.get("SOAK"), reason="a measurement for a machine that does nothing else")
def test_async_save_blocks_for_a_tenth_of_what_a_save_takes(tmp_path, one_rank):
    """The best of several tries, since other processes use the cores; the first try also allocates memory."""
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    blocked = {}
    for save_async in (False, True):
        keeper = checkpointer(tmp_path / str(save_async), one_rank, save_async=save_async, max_checkpoints=1)
        seconds = []
        for step in range(1, 5):
            began = time.perf_counter()
            keeper.save(step, model, optimizer, {})
            seconds.append(time.perf_counter() - began)
            keeper.wait()
        blocked[save_async] = min(seconds)
    assert blocked[True] < 0.1 * blocked[False], blocked


def test_async_error_is_raised_by_wait_and_by_the_next_save(tmp_path, one_rank, monkeypatch):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1, save_async=True)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(manifest, "write", raising(full))
    keeper.save(2, model, optimizer, {})
    with pytest.raises(ValueError, match=r"could not save .*global_step_2.*No space left.*train\.max_checkpoints"):
        keeper.save(3, model, optimizer, {})
    keeper.save(3, model, optimizer, {})
    with pytest.raises(ValueError, match=r"could not save .*global_step_3"):
        keeper.wait()
    keeper.wait()
    assert names(tmp_path) == ["global_step_1", "latest"]


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (manager, "_require_shared"),
        (dcp, "write"),
        (Checkpointer, "_write_plain"),
        (manifest, "write"),
        (manifest, "sync_folder"),
    ],
    ids=["begun", "tensors", "state", "manifest", "manifest-written"],
)
def test_a_kill_before_the_commit_leaves_no_checkpoint(tmp_path, one_rank, monkeypatch, where, what):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, what, raising(Killed()))
        with pytest.raises(Killed):
            keeper.save(2, model, optimizer, {})
    assert names(tmp_path) == [".global_step_2.tmp", "global_step_1", "latest"]
    assert keeper.latest() == tmp_path / "checkpoints/global_step_1"
    keeper.save(3, model, optimizer, {})
    assert names(tmp_path) == ["global_step_1", "global_step_3", "latest"]


def test_a_kill_after_the_commit_counts_as_saved(tmp_path, one_rank, monkeypatch):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", raising(Killed()))
        with pytest.raises(Killed):
            keeper.save(2, model, optimizer, {})
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step_1\n"
    assert keeper.latest() == tmp_path / "checkpoints/global_step_2"


def fill_the_disk(root: Path) -> list[str]:
    """A save while this rank, if it is 1, cannot write more than a few bytes into a file."""
    dist = init_world(torch.device("cpu"))
    model, optimizer, keeper = saved(root, dist, 1, layout="shard")
    if dist.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    with pytest.raises(ValueError, match=r"could not save .*global_step_2.*File too large"):
        keeper.save(2, model, optimizer, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert keeper.latest() == root / "checkpoints/global_step_1"
    keeper.save(3, model, optimizer, {})
    return names(root)


def test_one_ranks_write_error_reaches_all_and_leaves_the_last_checkpoint(tmp_path):
    assert run_ranks(2, fill_the_disk, tmp_path) == [["global_step_1", "global_step_3", "latest"]] * 2


def test_an_unwritable_folder(tmp_path, one_rank):
    (tmp_path / "checkpoints").write_text("a file")
    model, optimizer = build("plain")
    with pytest.raises(ValueError, match=r"could not save .*checkpoints"):
        checkpointer(tmp_path, one_rank).save(1, model, optimizer, {})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "state.json", "rng_0.json"])
def test_a_flipped_bit_is_found_and_named_before_anything_is_read(tmp_path, one_rank, monkeypatch, name):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    folder = tmp_path / "checkpoints/global_step_1"
    flip(folder / name)
    before = everything(model, optimizer)
    for reader in ("load", "_load"):
        monkeypatch.setattr(pickle, reader, raising(Killed()))
    monkeypatch.setattr(dcp, "_IndexUnpickler", raising(Killed()))
    monkeypatch.setattr(torch, "load", raising(Killed()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        keeper.resume(str(folder), model, optimizer)
    assert_same(everything(model, optimizer), before)


def cut(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "__0_0.distcp is damaged: .* bytes instead of"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 9}'), "format other than 1"),
        (lambda folder: flip(folder / ".metadata"), "SHA-256"),
    ],
    ids=["cut", "file", "no-manifest", "bad-manifest", "format", "content"],
)
def test_latest_passes_over_damage_and_says_why(tmp_path, one_rank, warnings, damage, reason):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1, 2, 3)
    damage(tmp_path / "checkpoints/global_step_3")
    assert keeper.latest() == tmp_path / "checkpoints/global_step_2"
    [record] = [record for record in warnings.records if record.levelno == logging.WARNING]
    assert "global_step_3" in record.getMessage()
    with pytest.raises(ValueError, match=reason) as error:
        keeper.resume(str(tmp_path / "checkpoints/global_step_3"), model, optimizer)
    assert str(error.value) in record.getMessage()
    assert keeper.resume("auto", model, optimizer) == {"step": 2}


def damaged_on_ranks(root: Path) -> list[str]:
    """Rank 1 hashes the damaged file; both ranks must get the error."""
    dist = init_world(torch.device("cpu"))
    model, optimizer, keeper = saved(root, dist, 1, 2, layout="shard")
    if dist.is_main:
        flip(root / "checkpoints/global_step_2/__0_0.distcp")
    dist.barrier()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        keeper.resume(str(root / "checkpoints/global_step_2"), model, optimizer)
    found = keeper.latest()
    assert found is not None
    return [found.name]


def test_damage_is_found_on_all_ranks(tmp_path):
    assert run_ranks(2, damaged_on_ranks, tmp_path) == [["global_step_1"]] * 2


def test_the_newest_is_the_one_committed_last(tmp_path, one_rank):
    """After resuming from an earlier step, the continued branch counts, not the abandoned one."""
    _, _, keeper = saved(tmp_path, one_rank, 1, 5, 3)
    assert keeper.latest() == tmp_path / "checkpoints/global_step_3"


def test_saving_a_step_again_replaces_it(tmp_path, one_rank):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1, 2, 2)
    assert names(tmp_path) == ["global_step_1", "global_step_2", "latest"]
    expected = everything(model, optimizer)
    train(model, optimizer, 1)
    keeper.resume("auto", model, optimizer)
    assert_same(everything(model, optimizer), expected)


def test_retention(tmp_path, one_rank, monkeypatch):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1, 2, 3, max_checkpoints=2)
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest"]
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(ValueError, match="No space"):
            keeper.save(4, model, optimizer, {})
    assert names(tmp_path) == ["global_step_2", "global_step_3", "latest"], "nothing is removed for a save that failed"
    keeper.save(5, model, optimizer, {})
    assert names(tmp_path) == ["global_step_3", "global_step_5", "latest"]


def test_what_is_no_index_is_refused(tmp_path, one_rank):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    folder = tmp_path / "checkpoints/global_step_1"
    for content in (b"", b"junk", pickle.dumps({}), pickle.dumps([1])):
        forge(folder, ".metadata", content)
        with pytest.raises(ValueError, match="is not the index of a checkpoint"):
            keeper.resume(str(folder), model, optimizer)


def test_an_entry_that_would_be_unpickled_freely_is_refused(tmp_path, one_rank):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    folder = tmp_path / "checkpoints/global_step_1"
    index = dcp.read_index(folder)
    index.state_dict_metadata["model.scale"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    forge(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match=r"model\.scale is not a tensor"):
        keeper.resume(str(folder), model, optimizer)


def test_a_place_outside_the_checkpoint_is_refused(tmp_path, one_rank):
    model, optimizer, keeper = saved(tmp_path, one_rank, 1)
    folder = tmp_path / "checkpoints/global_step_1"
    index = dcp.read_index(folder)
    next(iter(index.storage_data.values())).relative_path = "../elsewhere"
    forge(folder, ".metadata", pickle.dumps(index))
    with pytest.raises(ValueError, match=r"outside the checkpoint: \.\./elsewhere"):
        keeper.resume(str(folder), model, optimizer)
    found = manifest.read(folder)
    manifest.write(folder, replace(found, files={**found.files, "../state.json": found.files["state.json"]}))
    with pytest.raises(ValueError, match=r"outside its folder: \.\./state\.json"):
        keeper.resume(str(folder), model, optimizer)


def test_tensors_that_do_not_fit_are_listed(tmp_path, one_rank):
    _, _, keeper = saved(tmp_path, one_rank, 1)
    model, _ = build("plain")
    model.body[0] = nn.Linear(6, 4)
    model.extra = nn.Parameter(torch.zeros(2))
    model.body[2] = nn.Linear(5, 6, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError) as error:
        keeper.resume("auto", model, optimizer)
    message = str(error.value)
    assert "lacks model.extra" in message
    assert "model.body.0.weight [5, 6] instead of [4, 6]" in message
    assert "model.body.2.bias" in message


def test_missing_optimizer_state_is_listed(tmp_path, one_rank):
    saved(tmp_path, one_rank, 1)
    model, optimizer = build("plain", "bf16")
    with pytest.raises(ValueError, match=r"lacks .*optimizer\.embed\.weight\.compensation.*train\.optimizer"):
        checkpointer(tmp_path, one_rank).resume("auto", model, optimizer)


def test_arguments_that_make_a_checkpoint_unfit_are_named(tmp_path, one_rank):
    """If hundreds of tensors differ, the error names a few, and the arguments that cause the difference."""

    def keeper(**train):
        text = to_yaml(from_dict({"train": {"seed": 1, **train}}))
        return Checkpointer(tmp_path, one_rank, save_async=False, documents={"config.yaml": text})

    model, optimizer = build("plain")
    keeper(architecture="lora", lora_rank=8).save(1, model, optimizer, {})
    other = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    with pytest.raises(ValueError) as error:
        keeper(architecture="lora", lora_rank=4, lr=1.0).resume("auto", other, torch.optim.AdamW(other.parameters()))
    message = str(error.value)
    assert "it lacks model.0.weight, model.0.bias, model.1.weight and 77 more" in message
    assert message.endswith("Set back what has changed since it was saved: train.lora_rank is 4 and was 8")


def test_another_precision_is_said(tmp_path, one_rank, warnings):
    model, _, keeper = saved(tmp_path, one_rank, 1)
    other, resumed = build("plain")
    other.bfloat16()
    keeper.resume("auto", other, resumed)
    assert "another precision" in warnings.text
    torch.testing.assert_close(other.embed.weight, model.embed.weight.bfloat16())


def test_where_to_load_from(tmp_path, one_rank, warnings):
    model, optimizer = build("plain")
    keeper = checkpointer(tmp_path, one_rank)
    assert keeper.resume(None, model, optimizer) is None
    assert not warnings.records
    assert keeper.resume("auto", model, optimizer) is None
    assert "starting afresh" in warnings.text
    with pytest.raises(ValueError, match=r"train\.load_checkpoint_path: there is no folder .*nowhere"):
        keeper.resume(str(tmp_path / "nowhere"), model, optimizer)
    with pytest.raises(ValueError, match=r"train\.load_checkpoint_path: .* holds no whole checkpoint"):
        keeper.resume(str(tmp_path), model, optimizer)
    saved(tmp_path, one_rank, 1, 2)
    folder = tmp_path / "checkpoints"
    elsewhere = checkpointer(tmp_path / "other", one_rank)
    for path, step in ((tmp_path, 2), (folder, 2), (folder / "global_step_1", 1)):
        assert elsewhere.resume(str(path), model, optimizer) == {"step": step}
    shutil.move(folder / "global_step_2", tmp_path / "kept")
    assert elsewhere.resume(str(tmp_path), model, optimizer) == {"step": 1}


def test_a_model_alone_is_read(tmp_path, one_rank):
    model, _, _ = saved(tmp_path, one_rank, 1)
    with torch.device("meta"):
        fresh = Tiny()
    fresh.to_empty(device="cpu")
    fresh.head.weight = fresh.embed.weight
    read_model(find_checkpoint(tmp_path, one_rank)[0], fresh, one_rank)
    for name, value in model_tensors(model).items():
        assert torch.equal(value, model_tensors(fresh)[name]), name


def test_making_optimizer_state_changes_no_parameter():
    for kind in ("adamw", "bf16"):
        model, _ = build("plain", kind)
        cls = torch.optim.AdamW if kind == "adamw" else AnyPrecisionAdamW
        optimizer = cls(model.parameters(), lr=0.1, weight_decay=0.1)
        before = {name: value.clone() for name, value in model_tensors(model).items()}
        create_optimizer_state(model, optimizer, skip={"scale"})
        for name, value in model_tensors(model).items():
            assert torch.equal(value, before[name]), name
        assert model.scale not in optimizer.state and model.embed.weight in optimizer.state
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert all(parameter.grad is None for parameter in model.parameters())


def test_state_must_be_plain(tmp_path, one_rank):
    model, optimizer = build("plain")
    keeper = checkpointer(tmp_path, one_rank)
    with pytest.raises(AssertionError, match="keys"):
        keeper.save(1, model, optimizer, {"data": [{1: 2}]})
