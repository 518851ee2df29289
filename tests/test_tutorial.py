"""docs/tutorial.md: its commands run as they are written, in order, on a tiny model under the same name.

Three things differ from the text: instead of `make quickstart`, only its last command runs; nothing is downloaded; and
a wrapper named `tutti` limits each run to one step.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.runs import TINY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text()
INSTEAD = {"make quickstart": "tutti train configs/quickstart.yaml"}
"""Commands run in place of lines that begin so."""

WRAPPER = """\
#!/bin/sh
[ "$1" = train ] && set -- "$@" --train.max_steps 1 --train.eval_steps 0 --train.sample_tokens 2
exec {python} -m tutti "$@"
"""


def blocks(kind: str) -> list[str]:
    """The fenced blocks of the page in this language."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def write_model(folder: Path) -> None:
    """A folder like that of a downloaded chat model, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    settings = {key: value for key, value in TINY.items() if key != "model_type"}
    config = AutoConfig.for_model(TINY["model_type"], **settings, eos_token_id=2)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "data/quickstart").save_pretrained(folder)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory as the reader has it: the project's data, and what its downloads make."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in ("data", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_model(folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (yaml_block,) = blocks("yaml")
    (folder / "smol.yaml").write_text(yaml_block)
    (json_block,) = blocks("json")
    (folder / "ask.jsonl").write_text(json_block)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/tutti").write_text(WRAPPER.format(python=sys.executable))
    (folder / ".venv/bin/tutti").chmod(0o755)
    return folder


def commands() -> Iterator[str]:
    for block in blocks("sh"):
        for line in block.splitlines():
            yield next((other for start, other in INSTEAD.items() if line.startswith(start)), line)


def test_every_command_runs_as_it_is_written(desk: Path) -> None:
    assert "tutti train configs/quickstart.yaml" in (ROOT / "Makefile").read_text()
    script = "".join(f"echo '+' {json.dumps(line)}\n{line}\n" for line in commands())
    done = subprocess.run(
        ["sh", "-e", "-c", script],
        cwd=desk,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{desk}/.venv/bin:{os.environ['PATH']}"},
        input="Hello!\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    made = ("runs/smol/report.html", "runs/smol/hf/final/config.json", "runs/smol-lora/hf/final/adapter_config.json")
    for file in (*made, "runs/smol-lora/hf/merged/model.safetensors"):
        assert (desk / file).exists(), file
    answers = [json.loads(line) for line in (desk / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len((desk / "ask.jsonl").read_text().splitlines())


def test_what_is_left_out_is_there_once() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert [sum(line.startswith(start) for line in lines) for start in INSTEAD] == [1]


def test_the_python_on_the_page_is_valid() -> None:
    (code,) = blocks("python")
    compile(code, "tutorial.md", "exec")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target
