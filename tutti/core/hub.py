"""Repositories of the Hugging Face hub, by name: `org/name`, or `org/name@revision` for a branch, tag or commit.

Transfers are done by huggingface_hub, which honors HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN, and caches files
by commit. This module adds what a run needs: which commit a name stands for (from the cache if the hub cannot be
reached), which files it has, downloading exactly the requested ones, and one-line errors that say what to do. Code in a
repository is never run.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tutti.config.nouns import counted
from tutti.core.remote import NotCachedError, progress_bars

log = logging.getLogger(__name__)

NAME = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
"""Regular expression for a repository's name and revision."""

_FILE = re.compile(r"\.(jsonl?|ndjson|csv|tsv|txt|parquet|arrow|gz|zst|ya?ml|safetensors|bin|gguf|jinja|model|py|md)$")
_IN_CACHE = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?")


@dataclass(frozen=True)
class Repo:
    """A repository at a revision. argument: the argument that named it, for errors."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str
    argument: str

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"

    def commit(self) -> str:
        """The commit of the revision; if the hub cannot be reached, the last known one."""
        import huggingface_hub as hub

        unreachable = None
        if not hub.constants.HF_HUB_OFFLINE:
            try:
                hub.HfApi().repo_info(self.name, repo_type=self.kind, revision=self.revision)
            except Exception as error:
                if (unreachable := _unreachable(error)) is None:
                    raise ValueError(self._explain(error)) from error
        first = "config.json" if self.kind == "model" else "README.md"
        with self._explained(unreachable):
            folder = hub.snapshot_download(
                self.name,
                repo_type=self.kind,
                revision=self.revision,
                allow_patterns=[first],
                local_files_only=hub.constants.HF_HUB_OFFLINE or unreachable is not None,
            )
        if unreachable is not None:
            log.warning("%s: %s is taken from the cache: %s", self.argument, self, unreachable)
        return Path(folder).name

    def files(self, commit: str) -> dict[str, int | None]:
        """The paths of all files of a commit (from `commit()`), with their sizes in bytes if known."""
        import huggingface_hub as hub
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = hub.get_cached_repo_tree(self.name, repo_type=self.kind, revision=commit)
            return {file.path: file.size for file in tree}
        except CachedRepoTreeNotFoundError:
            # The cache was filled by an old version of huggingface_hub, so only the cached files are known.
            folder = self.folder(commit)
            return {path.relative_to(folder).as_posix(): None for path in sorted(folder.rglob("*")) if path.is_file()}

    def folder(self, commit: str) -> Path:
        """The cache folder for the files of a commit, which may not exist."""
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
        return cache / f"{self.kind}s--{self.name.replace('/', '--')}" / "snapshots" / commit

    def download(self, commit: str, files: Sequence[str]) -> None:
        """Download these files of a commit into the cache, unless they are there."""
        import huggingface_hub as hub

        folder = self.folder(commit)
        missing = [file for file in files if not (folder / file).is_file()]
        if not missing:
            return
        if not hub.constants.HF_HUB_OFFLINE:
            log.info("downloading %s of %s to %s", counted(len(missing), "file"), self, folder)
        with self._explained(None):
            hub.snapshot_download(
                self.name,
                repo_type=self.kind,
                revision=commit,
                allow_patterns=[glob.escape(file) for file in missing],
            )

    def _explain(self, error: Exception, unreachable: str | None = None) -> str:
        """The error and what to do about it, in one line."""
        from huggingface_hub import constants, errors

        what, page = f"{self.argument}: {self}", f"{constants.ENDPOINT}/{'datasets/' * (self.kind == 'dataset')}"
        if isinstance(error, errors.GatedRepoError):
            return f"{what} is gated: accept its conditions at {page}{self.name}, then set HF_TOKEN or `hf auth login`"
        if isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"{what} is not there, and {constants.ENDPOINT} shows no {self.kind} of that name; if it is private, "
                "set HF_TOKEN or `hf auth login`"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return f"{what}: {self.name} has no branch, tag or commit {self.revision}"
        if isinstance(error, errors.LocalEntryNotFoundError) or unreachable:
            why = unreachable or _unreachable(error) or "the hub did not give it"
            if constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE is set"
            kind = " --repo-type dataset" if self.kind == "dataset" else ""
            return (
                f"{what} is not there, nor all of it in the cache {constants.HF_HUB_CACHE}, and {why}: `hf download "
                f"{self.name}{kind}` where there is a network, or give a local path"
            )
        if isinstance(error, errors.HfHubHTTPError):
            return f"{what}: {constants.ENDPOINT} refuses it: {_line(error)}"
        if isinstance(error, OSError) and error.strerror:
            return f"{what} cannot be stored in the cache {constants.HF_HUB_CACHE}: {error.strerror}"
        return f"{what}: {_line(error)}"

    @contextmanager
    def _explained(self, unreachable: str | None) -> Iterator[None]:
        # Warnings about patterns without a match are for us to decide.
        logger = logging.getLogger("huggingface_hub._snapshot_download")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            with progress_bars():
                yield
        except Exception as error:
            raise ValueError(self._explain(error, unreachable)) from error
        finally:
            logger.setLevel(level)


@dataclass(frozen=True)
class HubFiles:
    """Files of a repository at a commit."""

    repo: Repo
    commit: str
    files: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.repo.folder(self.commit)

    def local(self, *, download: bool) -> list[str]:
        """The paths of the files in the cache. NotCachedError: one is missing, and `download` is false."""
        if download:
            self.repo.download(self.commit, self.files)
        missing = [file for file in self.files if not (self.folder / file).is_file()]
        if missing:
            raise NotCachedError(f"{self.repo.argument}: {self.repo} lacks {missing[0]} in the cache {self.folder}")
        return [str(self.folder / file) for file in self.files]


def repo_named(kind: Literal["model", "dataset"], text: str, argument: str) -> Repo | None:
    """The repository that `text` names; None if it has another form, or is an existing local path."""
    match = re.fullmatch(NAME, text)
    if match is None or _FILE.search(match["name"]) or os.path.exists(text):
        return None
    return Repo(kind, match["name"], match["revision"] or "main", argument)


def name_in_cache(path: str | Path) -> tuple[str, str] | None:
    """The name and the commit of the model in `path`, if that is a folder of the hub's cache."""
    match = _IN_CACHE.fullmatch(Path(path).absolute().as_posix())
    return None if match is None else (f"{match[1]}/{match[2]}", match[3])


def named_base(path: str | None) -> tuple[str | None, str | None]:
    """The name under which an adapter records its base model at `path`: its hub name and commit, or the absolute
    path and None; (None, None) without a path."""
    return (path and name_in_cache(path)) or (path and str(Path(path).absolute()), None)


def path_of_base(name: str, revision: str | None) -> str:
    """The inverse of `named_base`: the model that an adapter records as its base, as a value of model.model_path."""
    return f"{name}@{revision}" if revision and not Path(name).exists() else name


def _unreachable(error: Exception) -> str | None:
    """Why the hub did not answer; None if it did, or for other errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return _unreachable(error.__cause__) if isinstance(error.__cause__, Exception) else None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else 500
        return f"{constants.ENDPOINT} answers with status {status}" if status >= 500 or status == 429 else None
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return f"{constants.ENDPOINT} cannot be reached ({_line(error)})"
    return None


def _line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
