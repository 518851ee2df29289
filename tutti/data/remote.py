"""Remote data: datasets of the Hugging Face hub by name (`tutti.data.hub`), and files behind URLs.

A URL (`s3://`, `gs://`, ...) is a file, a folder or a glob that fsspec reads, with the package for its kind of storage.
Copies are in `$TUTTI_CACHE` (default `~/.cache/tutti`), by URL and version. One process of a node writes a copy under
another name and renames it when it is complete, while the others wait.

To find out which files a run reads, rank 0 opens the sources first, and downloads remote files on request.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tutti.config import Config
from tutti.core.dist import World
from tutti.core.files import cache_folder, make_once
from tutti.core.hub import HubFiles
from tutti.core.remote import NotCachedError, fetch, progress_bars
from tutti.data.hub import IsData, is_rows, pin_path, pin_split
from tutti.data.source import LocalCopies, is_data, open_sources

log = logging.getLogger(__name__)

_URL = re.compile(r"[a-z][a-z0-9+.-]*://")
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
}


def fetch_data(config: Config, world: World) -> LocalCopies:
    """Download the remote files that the data paths name; returns a function that gives the local copies for a part of
    a path. Collective.

    ValueError, on all ranks: they do not exist, or another part of a path is wrong.
    """

    def pin() -> dict[tuple[str, str], HubFiles | UrlFiles]:
        found: dict[tuple[str, str], HubFiles | UrlFiles] = {}

        def bring(argument: str, part: str) -> list[str] | None:
            files = found.get((argument, part)) or pin_data(argument, part)
            if files is None:
                return None
            found[argument, part] = files
            return files.local(download=True)

        if ":" not in config.data.datasets_type:  # a user's dataset locates its rows itself
            open_sources(config, elsewhere=bring)
            if config.data.eval_path:
                open_sources(config, config.data.eval_path, elsewhere=bring)
        return found

    found = fetch(pin, world)
    return lambda *part: found[part].local(download=False) if part in found else None


def pin_data(argument: str, part: str) -> HubFiles | UrlFiles | None:
    """The remote files for a part of the data path in `argument`; None if it names none.

    Files on the hub are downloaded. ValueError: they do not exist, or there is no such split or file.
    """
    if not _URL.match(part):
        return pin_split(argument, part, is_data)
    return pin_path(argument, part, is_data) if part.startswith("hf://") else pin_url(argument, part, is_data)


@dataclass(frozen=True)
class UrlFiles:
    """Files behind URLs, each with an identifier of its current version."""

    argument: str
    files: tuple[tuple[str, str], ...]

    def local(self, *, download: bool) -> list[str]:
        """The paths of the copies. NotCachedError: one is missing, and `download` is false."""
        folder = cache_folder()
        copies = []
        for url, version in self.files:
            copy = folder / hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:32] / PurePosixPath(url).name
            if download:
                with _explained(self.argument, url):
                    _copy_once(url, copy)
            elif not copy.exists():
                raise NotCachedError(f"{self.argument}: the copy of {url} in {folder} (TUTTI_CACHE) is gone")
            copies.append(str(copy))
        return copies


def pin_url(argument: str, url: str, is_data: IsData) -> UrlFiles:
    """The data files of a URL: a file, a folder or a glob. ValueError: there are none."""
    with _explained(argument, url):
        from fsspec.core import url_to_fs

        system, path = url_to_fs(url)
        if any(letter in path for letter in "*?["):
            paths = [each for each in sorted(system.glob(path)) if is_rows(PurePosixPath(each).name, is_data)]
        elif system.isdir(path):
            inside = {each: each.removeprefix(path).lstrip("/") for each in sorted(system.find(path))}
            paths = [each for each, name in inside.items() if is_rows(name, is_data)]
        else:
            paths = [path]
        if not paths:
            raise ValueError(f"{argument}: {url} holds no data file")
        files = tuple((system.unstrip_protocol(each), repr(sorted(system.info(each).items()))) for each in paths)
    return UrlFiles(argument, files)


def _copy_once(url: str, copy: Path) -> None:
    """Copy a file to `copy` unless it exists."""
    from fsspec.callbacks import NoOpCallback, TqdmCallback
    from fsspec.core import url_to_fs

    def download(draft: str) -> None:
        log.info("downloading %s", url)
        system, path = url_to_fs(url)
        with progress_bars() as shown:
            bar = {"desc": copy.name, "unit": "B", "unit_scale": True}
            system.get_file(path, draft, callback=TqdmCallback(tqdm_kwargs=bar) if shown else NoOpCallback())

    copy.parent.mkdir(parents=True, exist_ok=True)
    make_once(copy, download)


@contextmanager
def _explained(argument: str, url: str) -> Iterator[None]:
    """Convert errors about a URL to one line; each kind of storage has its own."""
    try:
        yield
    except ImportError as error:
        protocol = url.partition("://")[0]
        package = _PACKAGES.get(protocol)
        advice = f"install the package {package} (pip install {package})" if package else str(error)
        raise ValueError(f"{argument}: to read {protocol}:// {advice}") from error
    except FileNotFoundError as error:
        raise ValueError(f"{argument}: {url} does not exist") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(argument):
            raise
        line = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{argument}: {url} cannot be read: {type(error).__name__} {line}") from error
