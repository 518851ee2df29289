"""report.html: its contents, its size, and how a browser shows it."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tutti.config import Config, DataConfig, TrainConfig
from tutti.core.dist import World
from tutti.data.loader import DataSummary
from tutti.train.logging import html as module
from tutti.train.logging.history import History
from tutti.train.logging.html import render
from tutti.train.logging.metrics import Metrics

STEPS, EVALS, NAN_STEP = 120, 6, 50
CHARTS = {"loss", "lr", "grad_norm", "throughput", "packing", "memory", "step_seconds", "source_loss", "source_tokens"}
CHARTS |= {"rewards", "reward_accuracy", "eval_source_loss", "sample_length", "answers"}
HOSTILE = '</script><script>document.title="taken"</script> {{DATA}} & "quotes"'
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-default-apps"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--window-size=1280,1600", "--virtual-time-budget=5000", "--dump-dom"),
]
PICTURE = "data:image/png;base64," + (
    "iVBORw0KGgoAAAANSUhEUgAAAAMAAAACCAIAAAASFvFNAAAAEElEQVR4nGP8zwAFTDAGAwATKQED8NgHhAAAAABJRU5ErkJggg=="
)
"""Three by two pixels."""
PROBE = """
<script>
const seen = {resources: performance.getEntriesByType("resource").map((entry) => entry.name)};
seen.pictures = [...document.images].map((image) => image.naturalWidth);
const svg = document.querySelector("#chart-loss svg");
const box = svg.getBoundingClientRect();
const { place } = Charts.all.find((chart) => chart.spec.id === "loss");
const middle = place.x(60) / place.width * box.width;
svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + middle, clientY: box.top + 40, bubbles: true}));
const rows = [...document.querySelectorAll("#chart-loss .tip div")];
seen.tip = Object.fromEntries(rows.map((row) => [row.children[1].textContent, row.children[2].textContent]));
seen.step = document.querySelector("#chart-loss .tip b").textContent;
const tops = () => [...document.querySelectorAll("#chart-loss svg text")].map((node) => node.textContent);
seen.linear = tops();
document.querySelector("#chart-loss input[type=checkbox]").click();
seen.log = tops();
seen.wide = document.documentElement.scrollWidth <= innerWidth;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>
"""


def training_record(step: int) -> dict[str, Any]:
    loss = math.nan if step == NAN_STEP else 1.5 + 4 / math.sqrt(step)
    return {
        "step": step,
        "epoch": 0,
        "loss": loss,
        "grad_norm": 1 + 1 / step,
        "lr": 1e-4 * step / STEPS,
        "tokens": 1000,
        "trained_tokens": 800,
        "samples": 10,
        "step_seconds": 0.5,
        "tokens_per_second": 2000.0,
        "mfu": None,
        "memory_gib": 1.5,
        "packing": 0.96,
        "source_loss/books": 2.0 + 1 / step,
        "source_loss/code": 1.0 + 1 / step,
        "source_tokens/books": 600,
        "source_tokens/code": 200,
        "rewards/chosen": 0.01 * step,
        "rewards/rejected": -0.01 * step,
        "rewards/margin": 0.02 * step,
        "rewards/accuracy": 0.5,
    }


def eval_record(step: int) -> dict[str, Any]:
    by_source = {
        f"eval_source_loss/{name}": 2 + place / step for place, name in enumerate(["poems", "news", "letters"])
    }
    return {"step": step, "eval_loss": 2 + abs(step - 80) / 100, "eval_tokens": 5000, **by_source}


def make_run(folder: Path, status: str = "finished") -> None:
    config = Config(
        data=DataConfig(data_type="plaintext"), train=TrainConfig(output_dir=str(folder), lr=1e-4, micro_batch_size=4)
    )
    info = {
        "name": f"songs {HOSTILE}",
        "model": "Qwen3ForCausalLM",
        "parameters": 12_345_678,
        "layout": {"data parallel": "2 ranks, fsdp2"},
        "versions": {"torch": "2.14.1"},
        "data": lambda: DataSummary(500, 470, 90_000, 72_000, {"not a JSON object": 20, "no trained token": 10}, 0.96),
    }
    dist = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    metrics = Metrics(config, dist, total_steps=STEPS, run_info=info)
    metrics.log_text(0, "Capital of Peru?", "the the", right=False)
    metrics.log_answers(0, [True] + [False] * 39, [False] * 4)
    for step in range(1, STEPS + 1):
        metrics.log_step(training_record(step))
        if step % (STEPS // EVALS) == 0:
            metrics.log_eval(eval_record(step))
    metrics.log_text(STEPS, "Capital of Peru?", "Lima.", right=True)
    metrics.log_text(STEPS, "Once upon", f" a time {HOSTILE}", pictures=[PICTURE, PICTURE])
    metrics.log_answers(STEPS, [True] * 38 + [False] * 2, [True] + [False] * 3)
    metrics.close({"status": status, "message": "the disk is full" if status == "failed" else None})


class Page(html.parser.HTMLParser):
    """The elements of a page by id and by tag: attributes, text, and the chart they lie in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.texts: dict[str, str] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.paths: dict[str, list[dict[str, str | None]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.append((tag, values))
        name = values.get("id") or ""
        if name:
            self.attributes[name] = values
        if tag == "path" and "data-series" in values:
            chart = next(item for item in reversed(self.stack) if item.startswith("chart-"))
            self.paths.setdefault(chart.removeprefix("chart-"), []).append(values)
        if tag not in ("meta", "link", "input", "br"):
            self.stack.append(name)

    def handle_endtag(self, tag: str) -> None:
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        for name in filter(None, self.stack):
            self.texts[name] = self.texts.get(name, "") + data


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def looked_at(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, str]]:
    """The finished report as a browser shows it after its script has run, and what the browser logged."""
    if BROWSER is None:
        pytest.skip("no Chromium here: chromium, chromium-browser and google-chrome are not on PATH")
    profile = tmp_path_factory.mktemp("profile")
    copy = profile / "looked-at.html"
    copy.write_text((finished / "report.html").read_text().replace("</body>", f"{PROBE}</body>"))
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", copy.as_uri()]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "TZ": "UTC"}
    )
    yield Page(shown.stdout), shown.stderr


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found, "the page holds no data"
    return json.loads(found[1])


def test_charts_draw_every_point(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    assert set(page.paths) == CHARTS
    points = {
        (chart, path["data-series"]): len(re.findall("[ML]", path["d"] or ""))
        for chart in CHARTS
        for path in page.paths[chart]
    }
    assert points["loss", "Training"] == STEPS - 1
    assert points["loss", "Training, smoothed"] == STEPS - 1
    assert points["loss", "Evaluation"] == EVALS
    assert points["lr", "Learning rate"] == points["sample_length", "Sample length"] == STEPS
    assert points["rewards", "Chosen"] == points["rewards", "Rejected"] == STEPS
    assert points["source_loss", "books"] == points["source_loss", "code"] == STEPS
    # The line has a gap where a loss is NaN.
    assert [len(re.findall("M", path["d"] or "")) for path in page.paths["loss"]] == [2, 2, 1]
    shares = {path["data-series"]: path["data-columns"] for path in page.paths["source_tokens"]}
    assert shares == {"books (75.0 %)": "40", "code (25.0 %)": "40"}


def test_figures_are_the_data(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    final = training_record(STEPS)["loss"]
    assert f"{final:.4f}" in page.texts["tile-loss"]
    assert "2.0000" in page.texts["tile-eval"]
    assert "at step 80" in page.texts["tile-eval"]
    assert "120k" in page.texts["tile-tokens"]
    assert "96k trained on" in page.texts["tile-tokens"]
    assert "2k" in page.texts["tile-speed"]
    assert "12.3M" in page.texts["tile-parameters"]
    assert "12,345,678" in page.texts["tile-parameters"]
    assert page.texts["status"] == "Finished"
    assert page.texts["progress"] == "step 120 of 120"
    assert "loss is nan at step 50" in page.texts["non-finite"]
    report = page.texts["data-report"]
    assert "Rows kept470 (94.0 %)" in report
    assert "Dropped: not a JSON object20 (4.0 %)" in report
    assert "2 ranks, fsdp2" in page.texts["layout"]
    assert "2.14.1" in page.texts["versions"]
    assert "train.micro_batch_size4" in page.texts["config"]


def test_answers_are_counted_and_shown_beside_those_before_training(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    unseen = "1 of 4 answers to rows that it is not trained on are right (25.0 %); 0.0 % at step 0."
    assert page.texts["answers"] == f"38 of 40 answers are right (95.0 %); 2.5 % at step 0. {unseen}"
    assert "Lima.after step 120: rightthe thebefore training: wrong" in page.texts["page"]
    assert [len(re.findall("[ML]", path["d"] or "")) for path in page.paths["answers"]] == [2, 2]


def test_pictures_have_pixels_and_are_kept_once_and_bounded(
    looked_at: tuple[Page, str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, _ = looked_at
    assert json.loads(page.texts["probe"])["pictures"] == [3, 3]
    assert list(json.loads((finished / "run.json").read_text())["pictures"].values()) == [PICTURE]
    monkeypatch.setattr(module, "MAX_PICTURES", len(PICTURE) - 1)
    make_run(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["pictures"] == {}


def test_tooltip_and_log_scale(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    seen = json.loads(page.texts["probe"])
    assert seen["step"] == "step 60"
    rows = seen["tip"]
    assert float(rows["Training"]) == pytest.approx(training_record(60)["loss"], rel=1e-7)
    assert float(rows["Training, smoothed"]) == pytest.approx(training_record(60)["loss"], rel=0.01)
    assert float(rows["Evaluation"]) == pytest.approx(eval_record(60)["eval_loss"], rel=1e-7)
    assert seen["linear"] != seen["log"]
    assert "0" in seen["linear"]
    assert seen["wide"], "the page scrolls sideways"


def test_no_network_no_errors(looked_at: tuple[Page, str], finished: Path) -> None:
    page, logged = looked_at
    assert json.loads(page.texts["probe"])["resources"] == []
    assert [line for line in logged.splitlines() if "CONSOLE" in line] == []
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed")
        assert not attributes.get("src") or (tag, attributes["src"]) == ("img", PICTURE)
        assert tag == "a" or (attributes.get("href") or "data:").startswith("data:")
    source = (finished / "report.html").read_text()
    assert "default-src 'none'" in source
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(|@import|url\(", source)


def test_text_of_the_run_is_only_text(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 3
    assert HOSTILE in page.texts["page"]


def test_is_accessible(looked_at: tuple[Page, str]) -> None:
    page, _ = looked_at
    charts = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(charts) == len(CHARTS)
    assert all("over steps" in (chart["aria-label"] or "") and chart["tabindex"] == "0" for chart in charts)
    final = f"{training_record(STEPS)['loss']:.4f}"
    assert any(final in (chart["aria-label"] or "") for chart in charts)
    assert next(attributes for tag, attributes in page.tags if tag == "html")["lang"] == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    style = (Path(module.__file__).parent / "assets" / "report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#\w{6})", blocks[0 if scheme == "light" else 1]))

    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((light(colors[a]), light(colors[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card"):
        for text in ("ink", "soft", "accent", "good", "warn", "bad"):
            assert contrast(text, ground) >= 4.5, f"{text} on {ground}: {contrast(text, ground):.2f}"
        for line in ("second", *(f"c{i}" for i in range(12))):
            assert contrast(line, ground) >= 3, f"{line} on {ground}: {contrast(line, ground):.2f}"


def test_data_is_exact_while_every_step_has_its_point(finished: Path) -> None:
    data = data_of((finished / "report.html").read_text())
    assert data["train"]["step"] == list(range(1, STEPS + 1))
    assert data["train"]["width"] == 1
    expected = [training_record(step)["loss"] for step in range(1, STEPS + 1)]
    expected[NAN_STEP - 1] = None
    assert data["train"]["columns"]["loss"]["mean"] == expected
    assert [row["name"] for row in data["run"]["config"] if row["set"]] == [
        "data.data_type",
        "train.output_dir",
        "train.lr",
        "train.micro_batch_size",
    ]


def test_is_written_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    dist = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    config = Config(train=TrainConfig(output_dir=str(tmp_path)))
    metrics = Metrics(config, dist, total_steps=STEPS, run_info={})

    def shown() -> tuple[str, int]:
        data = data_of((tmp_path / "report.html").read_text())
        return data["run"]["status"], data["figures"]["last"].get("step", 0)

    assert shown() == ("running", 0)
    metrics.log_step(training_record(1))
    assert shown() == ("running", 0)
    now[0] += module.WRITE_EVERY
    metrics.log_step(training_record(2))
    metrics.log_step(training_record(3))
    assert shown() == ("running", 2)
    metrics.close({"status": "stopped", "message": "asked to", "hours": 2})
    assert shown() == ("stopped", 3)
    assert data_of((tmp_path / "report.html").read_text())["run"]["summary"] == {"hours": 2}
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_data_is_what_has_been_read_when_the_run_stops(tmp_path: Path) -> None:
    read = [0]
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    config = Config(train=TrainConfig(output_dir=str(tmp_path)))
    metrics = Metrics(config, world, total_steps=STEPS, run_info={"data": lambda: {"rows": read[0]}})
    assert data_of((tmp_path / "report.html").read_text())["run"]["data"] == {"rows": 0}
    read[0] = 7
    metrics.close({"status": "stopped"})
    assert data_of((tmp_path / "report.html").read_text())["run"]["data"] == {"rows": 7}


def test_a_full_disk_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "replace_file", full)
    with caplog.at_level("WARNING", "tutti"):
        make_run(tmp_path)
    assert "the report could not be written: no space left" in caplog.text


def test_a_long_run_stays_small() -> None:
    history = History()
    for step in range(1, 1_000_001, 250):
        record = training_record(step)
        for i in range(20):
            record[f"source_loss/s{i}"] = 1 / (step + i)
            record[f"source_tokens/s{i}"] = i
        history.add(record)
    page = render({"name": "long", "total_steps": 1_000_000}, history)
    assert len(page.encode()) < 1_000_000
    data = data_of(page)
    assert 500 <= len(data["train"]["step"]) <= 1000
    loss = data["train"]["columns"]["loss"]
    assert max(loss["high"]) == pytest.approx(5.5, rel=1e-5)
    assert all(low <= mean <= high for low, mean, high in zip(loss["low"], loss["mean"], loss["high"], strict=True))
    names = [source["name"] for source in data["sources"]]
    assert len(names) == module.MAX_SOURCES + 1
    assert names[-1] == "10 smaller sources"
    counted = sum(
        sum(column["sum"]) for name, column in data["train"]["columns"].items() if name.startswith("source_tokens")
    )
    assert counted == pytest.approx(sum(history.source_tokens.values()), rel=1e-4)
