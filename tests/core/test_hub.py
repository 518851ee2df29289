"""Hub names, tested with a local server and a cache: commits, downloaded files, and error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub import HubServer, use_hub
from tutti.core.hub import HubFiles, Repo, name_in_cache, repo_named
from tutti.core.remote import NotCachedError

FILES = {"config.json": b"{}", "a.txt": b"one", "b.txt": b"two"}


def model(name: str = "org/tiny", revision: str = "main") -> Repo:
    return Repo("model", name, revision, "model.model_path")


def test_only_the_files_that_are_asked_for_are_downloaded(hub: HubServer) -> None:
    commit = hub.add("models/org/tiny", FILES)
    repo = model()
    assert repo.commit() == commit
    assert set(repo.files(commit)) == set(FILES)
    (path,) = HubFiles(repo, commit, ("a.txt",)).local(download=True)
    assert Path(path).read_bytes() == b"one"
    assert name_in_cache(Path(path).parent) == ("org/tiny", commit)
    assert hub.downloads() == ["a.txt", "config.json"]


def test_a_revision_is_another_commit(hub: HubServer) -> None:
    hub.add("models/org/tiny", FILES)
    second = hub.add("models/org/tiny", FILES | {"a.txt": b"three"}, revision="v2")
    repo = model(revision="v2")
    assert repo.commit() == second
    (path,) = HubFiles(repo, second, ("a.txt",)).local(download=True)
    assert Path(path).read_bytes() == b"three"


def test_a_branch_that_moves_does_not_move_what_is_pinned(hub: HubServer) -> None:
    first = hub.add("models/org/tiny", FILES)
    pinned = HubFiles(model(), model().commit(), ("a.txt",))
    hub.add("models/org/tiny", FILES | {"a.txt": b"moved"})
    (path,) = pinned.local(download=True)
    assert (pinned.commit, Path(path).read_bytes()) == (first, b"one")


def test_offline_the_cache_answers(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add("models/org/tiny", FILES)
    HubFiles(model(), model().commit(), ("a.txt",)).local(download=True)
    hub.requests.clear()
    use_hub(monkeypatch, hub.endpoint, tmp_path / "home", offline=True)
    assert model().commit() == commit
    assert HubFiles(model(), commit, ("a.txt",)).local(download=True)
    assert not hub.requests
    with pytest.raises(NotCachedError, match=r"org/tiny lacks b.txt in the cache"):
        HubFiles(model(), commit, ("b.txt",)).local(download=False)
    with pytest.raises(ValueError, match=r"org/tiny is not there, nor all of it in the cache .*HF_HUB_OFFLINE is set"):
        HubFiles(model(), commit, ("b.txt",)).local(download=True)


def test_offline_and_not_in_the_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "home", offline=True)
    with pytest.raises(ValueError) as caught:
        Repo("dataset", "org/rows", "main", "data.train_path").commit()
    assert str(caught.value) == (
        f"data.train_path: org/rows is not there, nor all of it in the cache {tmp_path}/home/hub, and HF_HUB_OFFLINE "
        "is set: `hf download org/rows --repo-type dataset` where there is a network, or give a local path"
    )


@pytest.mark.parametrize("silent", [False, True])
def test_a_hub_out_of_reach_leaves_the_cache(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, silent: bool
) -> None:
    commit = hub.add("models/org/tiny", FILES)
    HubFiles(model(), model().commit(), ("a.txt",)).local(download=True)
    if silent:
        use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "home")
    hub.down = True
    assert model().commit() == commit
    assert "org/tiny is taken from the cache" in caplog.text
    with pytest.raises(ValueError, match=r"org/other is not there, nor all of it in the cache .* (503|be reached)"):
        model("org/other").commit()


def test_errors_say_what_to_do(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("models/org/tiny", FILES)
    hub.add("models/org/secret", FILES)
    hub.add("models/org/asked", FILES)
    hub.private.add("models/org/secret")
    hub.gated.add("models/org/asked")
    with pytest.raises(ValueError, match=r"model.model_path: org/none is not there, and http.* shows no model of that"):
        model("org/none").commit()
    with pytest.raises(ValueError, match=r"model.model_path: org/tiny@v9: org/tiny has no branch, tag or commit v9"):
        model(revision="v9").commit()
    with pytest.raises(ValueError, match=r"org/secret is not there, .* if it is private, set HF_TOKEN"):
        model("org/secret").commit()
    with pytest.raises(ValueError, match=r"org/asked is gated: accept its conditions at http.*/org/asked, then set"):
        model("org/asked").commit()
    use_hub(monkeypatch, hub.endpoint, tmp_path / "home", token=hub.token)
    assert model("org/secret").commit()
    assert model("org/asked").commit()


def test_what_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def name(text: str) -> tuple[str, str] | None:
        repo = repo_named("model", text, "model.model_path")
        return repo and (repo.name, repo.revision)

    assert name("Qwen/Qwen2.5-0.5B") == ("Qwen/Qwen2.5-0.5B", "main")
    assert name("org/name@refs/pr/1") == ("org/name", "refs/pr/1")
    for path in (
        "name",
        "./org/name",
        "/org/name",
        "~/name",
        "org/name/more",
        "data/rows.jsonl",
        "org/*",
        "org/config.json",
    ):
        assert name(path) is None, path
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert name("org/name") is None, "a folder of that name wins"
