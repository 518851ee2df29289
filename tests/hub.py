"""A small server with the Hugging Face hub's protocol on 127.0.0.1, for repositories that a test defines."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants


@dataclass
class HubServer:
    """repos: by kind and name (`models/org/name`) the files of each revision. private: repos that want the token.

    requests: what has been asked, as "METHOD path". down: whether every request is answered with status 503.
    """

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    token: str = "hf_secret"
    requests: list[str] = field(default_factory=list)
    down: bool = False
    endpoint: str = ""

    def add(self, repo: str, files: dict[str, bytes] | Path, revision: str = "main") -> str:
        """Publish files, or a folder's, as a revision of `models/org/name` or `datasets/org/name`; its commit."""
        if isinstance(files, Path):
            found = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[revision] = files
        self.repos[repo][commit] = files
        return commit

    def downloads(self) -> list[str]:
        """The paths of the files that have been sent, sorted."""
        found = [request.partition("/resolve/")[2] for request in self.requests if request.startswith("GET")]
        return sorted(path.partition("/")[2] for path in found if path)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, parts = self.hub, unquote(urlsplit(self.path).path).strip("/").split("/")
        hub.requests.append(f"{self.command} {'/'.join(parts)}")
        if hub.down:
            self._send(503, b"down")
            return
        parts = parts[parts[0] == "api" :]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        org, name, *rest = parts
        repo = f"{kind}/{org}/{name}"
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if repo not in hub.repos or (repo in hub.private and not allowed):
            self._fail(404 if allowed else 401, "RepoNotFound")
        elif repo in hub.gated and not allowed and "resolve" in rest:
            self._fail(403, "GatedRepo")
        else:
            what, revision = (rest[0], rest[1]) if rest else ("revision", "main")
            files = hub.repos[repo].get(revision)
            if files is None:
                self._fail(404, "RevisionNotFound")
            else:
                commit = next(key for key, value in hub.repos[repo].items() if value is files and len(key) == 40)
                self._give(what, "/".join(rest[2:]), files, commit, f"{org}/{name}")

    def _give(self, what: str, path: str, files: dict[str, bytes], commit: str, name: str) -> None:
        if what == "revision":
            siblings = [{"rfilename": file} for file in files]
            self._send_json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})
        elif what == "tree":
            sums = {file: hashlib.sha1(content).hexdigest() for file, content in files.items()}
            tree = [{"type": "file", "path": file, "size": len(files[file]), "oid": sums[file]} for file in files]
            self._send_json(tree)
        elif path not in files:
            self._fail(404, "EntryNotFound")
        else:
            headers = {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X-Repo-Commit": commit}
            self._send(200, files[path], headers)

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub without repositories, at `endpoint`."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(
    monkeypatch: pytest.MonkeyPatch, endpoint: str, home: Path, *, offline: bool = False, token: str | None = None
) -> None:
    """Apply HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN to this process, as if set before its start."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    close_session()
