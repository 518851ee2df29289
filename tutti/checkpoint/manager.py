"""Checkpoints: the whole state of a run in a folder that is either complete or not a checkpoint.

A save consists of these steps; each is finished on all ranks, or has failed on all, before the next begins:

1. Every rank checks that all numbers to save are finite; rank 0 removes what an interrupted save may have left and
   creates `.global_step_N.tmp`.
2. Every rank writes its parts of the model's and the optimizer's tensors and the state of its random generators, and
   rank 0 the plain state of the run (JSON). Everything is flushed to stable storage.
3. Every rank hashes its own files; rank 0 writes the manifest of all.
4. Rank 0 renames the folder to `global_step_N` (the commit), points `latest` to it, and only then removes checkpoints
   beyond the number to keep, but never the newest, nor with `keep_best` the one with the lowest evaluation loss.

A crash at any point leaves the earlier checkpoints untouched, and at most a folder with a temporary name. With
`save_async` the tensors are first copied to host memory, and the steps run in a thread during training, on a process
group of their own. A checkpoint also contains the documents that describe its model (configuration), so that it can be
exported whatever has changed around it.

A load verifies all sizes and hashes before it looks into any file, compares names and shapes, and then fills the live
tensors in place, whatever layout or number of ranks wrote them. The random generators are restored if the number of
ranks is the same; otherwise they are seeded from the checkpoint and the rank.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.optim import Optimizer

from tutti import __version__
from tutti.checkpoint import dcp, manifest
from tutti.checkpoint.differences import CONFIG, differences
from tutti.checkpoint.lineage import Start, read_start, write_start
from tutti.checkpoint.manifest import File, Manifest
from tutti.checkpoint.state import (
    AVERAGE,
    create_optimizer_state,
    derive_rng,
    model_entries,
    model_tensors,
    optimizer_tensors,
    require_finite,
    restore_rng,
    rng_state,
    trained_parts,
    unstepped,
)
from tutti.core import files
from tutti.core.dist import World
from tutti.model.lora import listed, lora_of

log = logging.getLogger(__name__)

STATE = "state.json"
LATEST = "latest"
EVAL_LOSS = "eval_loss"

_LISTED = 3
"""Number of tensors of each kind to name if a checkpoint does not fit."""

_REPLACED, _SURPLUS = ".replaced.tmp", ".surplus.tmp"


class Checkpointer:
    """Saves to and resumes from the checkpoints of one output folder. Its methods are collective.

    It is a context manager: leaving it waits for a save in progress, even if training has failed meanwhile. save_async:
    write in the background. max_checkpoints: how many to keep, 0 for all. keep_best: additionally keep the one with the
    lowest evaluation loss. facts: plain data about the run for the manifest, besides versions and number of ranks
    (layout, configuration digest). documents: texts that go into every checkpoint, by file name.
    """

    def __init__(
        self,
        output: Path,
        world: World,
        *,
        save_async: bool,
        max_checkpoints: int = 0,
        keep_best: bool = False,
        facts: Mapping[str, Any] | None = None,
        documents: Mapping[str, str] | None = None,
    ) -> None:
        self._root = output / "checkpoints"
        self._world = world.on_own_group()
        self._save_async = save_async
        self._max_checkpoints, self._keep_best = max_checkpoints, keep_best
        versions = {"torch": torch.__version__, "transformers": version("transformers"), "tutti": __version__}
        self._facts = {"world": world.size, "versions": versions, **(facts or {})}
        self._documents = dict(documents or {})
        self._background: _Background | None = None
        self._copies: dict[str, Tensor] = {}
        self._start = Start()
        self._parent: dict[str, Any] | None = None

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            log.error("%s", failed)  # the user must see what ended the training

    def begin(self) -> Start:
        """Record the start of a run from what was resumed. `auto` then follows the checkpoints that are saved from
        now on and their past, and none beyond the point resumed from."""

        def record() -> None:
            write_start(self._root, self._start)
            if self._start.goes_back:
                files.replace_file(self._root / LATEST, f"{self._start.origin}\n")
            else:
                (self._root / LATEST).unlink(missing_ok=True)

        self._world.run_on_all_ranks(lambda: record() if self._world.is_main else None)
        return self._start

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer,
        state: Mapping[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Write a checkpoint after `step` steps; `state` is plain data, the same on every rank.

        eval_loss: of the current model, if it was evaluated. With save_async this returns once the tensors are copied,
        and `wait` reports the outcome. ValueError, on every rank: the files cannot be written, a number is not finite,
        or the previous save failed.
        """
        self.wait()
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        trained = trained_parts(model, optimizer)
        if self._save_async:
            dcp.copy_to_host(tensors, self._copies)
            trained = {name: self._copies[name] for name in trained}
        snapshot = _Snapshot(
            step=step,
            eval_loss=eval_loss,
            tensors=tensors,
            copies=self._copies if self._save_async else None,
            trained=trained,
            state=_plain(state),
            unstepped=unstepped(model, optimizer),
            rng=json.dumps(rng_state(self._world.device)),
        )
        if self._save_async:
            self._background = _Background(lambda: self._write(snapshot))
        else:
            self._write(snapshot)

    def wait(self) -> None:
        """Wait for a save in progress, and raise its error on every rank if it failed."""
        background, self._background = self._background, None
        if background is not None:
            background.join()

    def has_failed(self) -> bool:
        """True if a save in progress has failed, as far as this rank knows; `save` and `wait` raise the error. Not
        collective."""
        return self._background is not None and self._background.error is not None

    def latest(self) -> Path | None:
        """The last committed complete checkpoint; damaged ones are skipped with a warning that says why."""
        self.wait()
        newest = _newest(self._root, self._world)
        return newest[0] if newest else None

    def resume(self, path: str | None, model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
        """Load `model` and `optimizer` from a checkpoint, restore the random generators, and return its `state`.

        path: train.load_checkpoint_path: a checkpoint, an output folder (its newest complete checkpoint), or `auto`:
        this output folder's newest, or if it has none yet, the one elsewhere that its last start resumed from. For
        None, and for `auto` if there is neither, nothing is changed and None is returned. ValueError, on every rank:
        there is no checkpoint at `path`, or it is damaged, or of another `model` or `optimizer`.
        """
        if path is None:
            return None
        self.wait()
        world = self._world
        world.run_on_all_ranks(lambda: _put_back_replaced(self._root) if world.is_main else None)
        chosen = self._follow() if path == "auto" else find_checkpoint(Path(path), world)
        if chosen is None:
            log.info(
                "train.load_checkpoint_path is auto, and there is no checkpoint in %s: starting afresh", self._root
            )
            return None
        folder, found = chosen
        saved = world.run_on_all_ranks(lambda: json.loads((folder / STATE).read_text()))
        create_optimizer_state(model, optimizer, skip=set(saved["unstepped"]))
        tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
        config = self._documents.get(CONFIG, "")
        cast = _read(folder, tensors, model, world, prefixes=("model.", "optimizer."), now=config)
        if cast and world.is_main:
            log.warning("%s has another precision than this run, and is converted: %s", folder, listed(cast))
        if saved["world"] == world.size:
            rng = world.run_on_all_ranks(lambda: json.loads((folder / _rng_file(world.rank)).read_text()))
            restore_rng(rng, world.device)
        else:
            derive_rng(found.files[_rng_file(0)].sha256, world.rank)
        log.info("loaded %s, saved by %d rank%s", folder, saved["world"], "" if saved["world"] == 1 else "s")
        own = folder.resolve().parent == self._root.resolve()
        origin = folder.name if own else str(folder.resolve())
        self._start = Start(origin, found.step, self._start.id)
        self._parent = {"path": origin, "saved": found.saved}
        before, now = (facts.get("compute_dtype") for facts in (found.facts, self._facts))
        if before and before != now and world.is_main:
            log.warning(
                "%s was computed in %s: in %s the run goes on, but not exactly as it would have", folder, before, now
            )
        return saved["state"]

    def _follow(self) -> tuple[Path, Manifest] | None:
        """The checkpoint that `auto` refers to."""
        newest = _newest(self._root, self._world)
        start = self._world.run_on_all_ranks(lambda: read_start(self._root))
        if newest is None and start is not None and start.origin is not None and not start.goes_back:
            log.info("there is no checkpoint in %s yet: going on from where it began", self._root)
            return find_checkpoint(Path(start.origin), self._world)
        return newest

    def _write(self, snapshot: _Snapshot) -> None:
        final = self._root / manifest.folder_name(snapshot.step)
        partial = self._root / f".{final.name}.tmp"
        world = self._world
        world.run_on_all_ranks(lambda: require_finite(snapshot.trained, snapshot.step))
        try:
            world.run_on_all_ranks(lambda: self._prepare(partial))
            world.run_on_all_ranks(lambda: _require_shared(partial))
            dcp.write(partial, snapshot.tensors, snapshot.copies, world.group)
            unstepped = sorted({name for names in world.gather(snapshot.unstepped) for name in names})
            written = world.run_on_all_ranks(lambda: self._write_plain(partial, snapshot, unstepped))
            every = {name: file for part in world.gather(written) for name, file in part.items()}
            facts = self._facts if snapshot.eval_loss is None else {**self._facts, EVAL_LOSS: snapshot.eval_loss}
            content = Manifest(snapshot.step, facts, every, start=self._start.id, parent=self._parent)
            world.run_on_all_ranks(lambda: self._commit(partial, final, content))
        except Exception as error:
            if world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, (OSError, ValueError)):
                raise ValueError(f"could not save {final}: {_advised(files.describe_error(error))}") from error
            raise
        log.info("saved %s", final)

    def _prepare(self, partial: Path) -> None:
        if self._world.is_main:
            self._root.mkdir(parents=True, exist_ok=True)
            _put_back_replaced(self._root)
            for leftover in self._root.glob(".global_step_*.tmp"):
                shutil.rmtree(leftover)
            partial.mkdir()

    def _commit(self, partial: Path, final: Path, content: Manifest) -> None:
        if not self._world.is_main:
            return
        present = {path.name for path in partial.iterdir()}
        assert present == set(content.files), f"files {present} are not those described: {set(content.files)}"
        content = manifest.after(self._root, content)
        manifest.write(partial, content)
        replaced = _hide(final, _REPLACED) if final.exists() else None
        partial.rename(final)
        files.sync_folder(self._root)
        self._parent = {"path": final.name, "saved": content.saved}
        try:
            files.replace_file(self._root / LATEST, final.name + "\n")
            for hidden in [replaced, *(_hide(folder, _SURPLUS) for folder in self._surplus())]:
                if hidden is not None:
                    shutil.rmtree(hidden)
        except OSError as error:
            log.warning("%s is saved, but then: %s", final, files.describe_error(error))

    def _surplus(self) -> list[Path]:
        """The checkpoints to remove, now that the newest is saved."""
        found, _ = manifest.by_age(self._root)
        kept = found[: self._max_checkpoints or len(found)]
        if self._keep_best:
            evaluated = [entry for entry in found if EVAL_LOSS in entry[1].facts]
            kept += sorted(evaluated, key=lambda entry: entry[1].facts[EVAL_LOSS])[:1]
        return [folder for folder, _ in found if folder not in {path for path, _ in kept}]

    def _write_plain(self, folder: Path, snapshot: _Snapshot, unstepped: list[str]) -> dict[str, File]:
        """Write everything except tensors; returns the descriptions of all files that this rank wrote."""
        texts = {_rng_file(self._world.rank): snapshot.rng}
        if self._world.is_main:
            head = json.dumps({"world": self._world.size, "unstepped": unstepped})
            texts |= {STATE: f'{head[:-1]}, "state": {snapshot.state}}}\n', **self._documents}
        for name, text in texts.items():
            files.write_synced(folder / name, text)
        paths = [*map(folder.joinpath, texts), *dcp.files_of(folder, self._world.rank)]
        return {path.name: manifest.describe(path) for path in paths}


def find_checkpoint(path: Path, world: World) -> tuple[Path, Manifest]:
    """The checkpoint at `path`, or an output folder's newest complete one, all its files verified. Collective.

    ValueError, on every rank: there is none, or it is damaged.
    """
    if not world.run_on_all_ranks(path.is_dir):
        raise ValueError(f"train.load_checkpoint_path: there is no folder {path}")
    if manifest.is_folder_name(path.name):
        return path, manifest.verify(path, world)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = _newest(root, world)
    if newest is None:
        raise ValueError(
            f"train.load_checkpoint_path: {path} holds no whole checkpoint; give a folder global_step_N, an output "
            "folder that has one in its checkpoints/, or auto"
        )
    return newest


class ResumePreview(NamedTuple):
    """A checkpoint that will be resumed, before it is verified. facts: of its manifest. state: the saved one."""

    facts: Mapping[str, Any]
    state: Mapping[str, Any]


def preview_resume(path: str | None, output: Path) -> ResumePreview:
    """The checkpoint that `Checkpointer.resume` will find at `path`, for what is needed before tensors can be read.

    output: the run's output folder. Empty if there is none, or it cannot be read: `resume` reports why.
    """
    if path is None:
        return ResumePreview({}, {})
    folder = output if path == "auto" else Path(path)
    try:
        if not manifest.is_folder_name(folder.name):
            root = folder / "checkpoints" if path == "auto" or (folder / "checkpoints").is_dir() else folder
            candidates, start = _candidates(root)[0], read_start(root)
            if not candidates and start is not None and start.origin is not None:
                candidates = [root / start.origin]
            folder = candidates[0]
        return ResumePreview(manifest.read(folder).facts, json.loads((folder / STATE).read_text())["state"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return ResumePreview({}, {})


def leave_unsaved(folder: Path, model: nn.Module, world: World) -> None:
    """Freeze the image generation modules of an adapted `model` if the checkpoint in `folder` does not contain them:
    its run had no images to draw. Collective."""
    codes = getattr(model, "code_decoder", None)
    if codes is None or lora_of(model) is None:
        return
    saved = world.run_on_all_ranks(lambda: set(dcp.read_index(folder).state_dict_metadata))
    mine = {
        f"model.{name}" for name, item in model.named_parameters() if any(item is one for one in codes.parameters())
    }
    if mine and mine.isdisjoint(saved):
        codes.requires_grad_(False)


def read_model(folder: Path, model: nn.Module, world: World) -> None:
    """Load `model`, which must be allocated, from a checkpoint that `find_checkpoint` found, using the averages of its
    weights if there are any. Collective.

    ValueError, on every rank: it belongs to another model.
    """
    tensors = model_tensors(model)
    index = _fitting_index(folder, tensors, model, world, prefixes=("model.",))
    dcp.read(folder, index, {_averaged(name, index): tensor for name, tensor in tensors.items()}, world.group)


def model_reader(folder: Path, model: nn.Module, world: World) -> Callable[[str], Tensor]:
    """A function that reads a full tensor of `model` (which may be on the meta device), or its average, by name from
    a checkpoint that `find_checkpoint` found. Collective, as is the function; ValueError as in `read_model`."""
    tensors = model_tensors(model)
    entries = model_entries(model)
    first = {id(entry): f"model.{name}" for name, entry in reversed(entries.items())}
    index = _fitting_index(folder, tensors, model, world, prefixes=("model.",))

    def read(name: str) -> Tensor:
        stored = first[id(entries[name])]
        tensor = torch.empty(tensors[stored].shape, dtype=tensors[stored].dtype)
        dcp.read(folder, index, {_averaged(stored, index): tensor}, world.group)
        return tensor

    return read


def _averaged(name: str, index: Metadata) -> str:
    """The name in a checkpoint of the average of the tensor `model.<name>`; the tensor's own if there is none."""
    average = f"optimizer.{name.removeprefix('model.')}.{AVERAGE}"
    return average if average in index.state_dict_metadata else name


@dataclass(frozen=True)
class _Snapshot:
    """The state that one save writes. tensors: the live ones. copies: of this rank's parts of them. trained: the
    written parts of those that the optimizer changes. state, rng: JSON."""

    step: int
    eval_loss: float | None
    tensors: Mapping[str, Tensor]
    copies: Mapping[str, Tensor] | None
    trained: Mapping[str, Tensor]
    state: str
    unstepped: list[str]
    rng: str


class _Background:
    """A thread whose error is raised where it is joined."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join()
        if self.error is not None:
            raise self.error


def _rng_file(rank: int) -> str:
    return f"rng_{rank}.json"


def _advised(reason: str) -> str:
    """`reason` why a file could not be written on some rank, with advice if the disk is full."""
    full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
    return f"{reason}; make room, or keep fewer checkpoints (train.max_checkpoints)" if full else reason


def _require_shared(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{folder}, which rank 0 made, is not there: all machines must see the same train.output_dir")


def _hide(folder: Path, kind: str) -> Path:
    """Rename a checkpoint before removing it, so that it counts as a leftover if the removal is interrupted."""
    return folder.rename(folder.with_name(f".{folder.name}{kind}"))


def _put_back_replaced(root: Path) -> None:
    """Undo a replacement that was interrupted after the old checkpoint was renamed and before the new one was."""
    for hidden in root.glob(f".global_step_*{_REPLACED}"):
        final = hidden.with_name(hidden.name.removeprefix(".").removesuffix(_REPLACED))
        if not final.exists():
            hidden.rename(final)


def _plain(state: Any) -> str:
    """`state` as JSON that can be read back exactly."""

    def check(value: Any) -> None:
        if isinstance(value, Mapping):
            assert all(isinstance(key, str) for key in value), "JSON has no keys but strings"
        for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
            check(part)

    check(state)
    return json.dumps(state)


def _newest(root: Path, world: World) -> tuple[Path, Manifest] | None:
    """The last committed complete checkpoint of the current branch under `root`, verified.

    None: there is no checkpoint. ValueError: there are some, but all of them are damaged.
    """
    candidates, damaged = world.broadcast(world.run_on_all_ranks(lambda: _candidates(root) if world.is_main else None))
    newest = None
    for folder in candidates:
        try:
            newest = (folder, manifest.verify(folder, world))
            break
        except ValueError as error:
            damaged[folder] = str(error)
    if newest is None and damaged:
        folder, reason = next(iter(damaged.items()))
        raise ValueError(f"{root} holds no whole checkpoint; {len(damaged)} were passed over, {folder.name}: {reason}")
    if world.is_main:
        for folder, reason in damaged.items():
            log.warning("skipping %s: %s", folder, reason)
    return newest


def _candidates(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """The checkpoints of the current branch under `root`, newest first; and the damaged ones, with reasons."""
    found, damaged = manifest.by_age(root)
    start = read_start(root)
    return [folder for folder, it in found if start is None or start.owns(it.step, it.start)], damaged


def _read(
    folder: Path, tensors: dict[str, Tensor], model: nn.Module, world: World, prefixes: Sequence[str], now: str = ""
) -> list[str]:
    """Read `tensors` from a verified checkpoint; returns the names of those that were stored in another precision
    and converted. model, prefixes, now: as in `_fitting_index`."""
    index = _fitting_index(folder, tensors, model, world, prefixes, now)
    dcp.read(folder, index, tensors, world.group)
    stored: dict[str, Any] = index.state_dict_metadata
    return [name for name, tensor in tensors.items() if stored[name].properties.dtype != tensor.dtype]


def _fitting_index(
    folder: Path, tensors: Mapping[str, Tensor], model: nn.Module, world: World, prefixes: Sequence[str], now: str = ""
) -> Metadata:
    """The index of a verified checkpoint whose tensors with one of the prefixes are exactly `tensors`.

    model: its tied tensors may be in the checkpoint under any of their names. now: this run's config.yaml. ValueError,
    on every rank: names or shapes differ.
    """
    index = world.run_on_all_ranks(lambda: dcp.read_index(folder))
    stored = {name: entry for name, entry in index.state_dict_metadata.items() if name.startswith(tuple(prefixes))}
    known = set(tensors) | {f"model.{name}" for name in model_entries(model)}
    known = known.union(*world.gather(known))

    def compare() -> None:
        reshaped = [
            f"{name} {list(stored[name].size)} instead of {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name in stored and stored[name].size != tensor.shape
        ]
        problems = {
            "it lacks": [name for name in tensors if name not in stored],
            "it holds in another shape": reshaped,
            "it holds and the run does not": [name for name in stored if name not in known],
        }
        found = "; ".join(f"{what} {listed(names, _LISTED)}" for what, names in problems.items() if names)
        if found:
            advice = differences(folder / CONFIG, now)
            raise ValueError(f"{folder} does not fit the model and optimizer of this run: {found}. {advice}")

    world.run_on_all_ranks(compare)
    return index
