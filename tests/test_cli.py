"""The command line: subcommands, help, exit status, one-line errors, and no heavy imports before they are needed."""

import os
import pty
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tutti import __version__
from tutti.cli import main
from tutti.config import Config

ROOT = Path(__file__).parents[1]
NEEDED = ["data.train_path=rows.jsonl", "train.output_dir=runs/x", "model.model_path=qwen"]


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TUTTI_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def replace_run(monkeypatch: pytest.MonkeyPatch, train: object) -> None:
    module = ModuleType("tutti.train.run")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tutti.train.run", module)


def fail_with(error: Exception) -> object:
    def train(config: Config) -> None:
        raise error

    return train


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tutti", *argv],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("argv", "heavy"),
    [
        (["--help"], ["torch", "yaml", "rich", "numpy", "pydantic", "transformers"]),
        (["train", "--help"], ["torch", "yaml", "rich", "numpy", "pydantic", "transformers"]),
        (["args"], ["torch", "numpy", "pydantic", "transformers"]),
        (["args", "--json"], ["torch", "rich", "numpy", "pydantic", "transformers"]),
        (["train", "--train.lr", "x"], ["torch", "rich", "numpy", "pydantic", "transformers"]),
        (
            ["train", "train.global_batch_size=3", "train.micro_batch_size=2", *NEEDED],
            ["torch", "numpy", "transformers"],
        ),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_answers_without_heavy_imports(argv: list[str], heavy: list[str]) -> None:
    code = f"import sys; from tutti.cli import main; main({argv!r}); print([n for n in {heavy!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb}" in shown for verb in ("train", "check", "export", "args", "infer"))
    assert "torchrun" in shown


@pytest.mark.parametrize("verb", ["train", "check", "export", "args", "infer"])
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: tutti {verb}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()[0].isdigit()


def test_train_alone_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines] == ["data.train_path:", "train.output_dir:", "model.model_path:"]
    assert all(line.startswith("tutti: error: ") for line in lines)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["xyz"], "there is no command 'xyz'; see tutti --help"),
        (
            ["infer"],
            "infer.model_path: required; Model to generate with: a Hugging Face or adapter folder, a name on the hub "
            "(org/name, org/name@revision), a training checkpoint, or a run's output_dir.",
        ),
        (["infer", "--prompt"], "--prompt: needs a value"),
        (
            ["infer", "infer.model_path=x", "--input", "a"],
            "--input and --output belong together: the rows to answer, and where the answers go",
        ),
        (
            ["infer", "infer.model_path=x", "--input", "a", "--output", "b", "--prompt", "c"],
            "--prompt: either prompts or --input, not both",
        ),
        (
            ["infer", "infer.model_path=x", "--output", "a", "--output", "b", "--input", "c"],
            "--output: can be given once",
        ),
        (["export", "a"], "export: takes CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER, got a"),
        (["args", "nothing"], "nothing: no argument begins so"),
        (["args", "--yaml"], "args: unexpected --yaml; it takes [PREFIX] [--json | --markdown | --schema]"),
        (["args", "lr", "seed"], "args: unexpected seed; it takes [PREFIX] [--json | --markdown | --schema]"),
        (["export", "a", "b", "--merges"], "export: takes CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER, got a b --merges"),
        (["init"], "init: takes the name of a new folder, got none"),
        (["migrate", "-o", "x.yaml"], "migrate: takes FILE.yaml [-o OUT.yaml], got -o=x.yaml"),
        (["train", *NEEDED, "-x"], "-x: unknown option; an argument is written --a.b VALUE or a.b=VALUE"),
        (["train", "--nproc", "0"], "--nproc: expects a number of ranks, 1 or more, got '0'"),
        (["train", "--nproc"], "--nproc: expects a number of ranks, 1 or more, got ''"),
        (["train", "--max-restarts", "x"], "--max-restarts: expects a number of restarts, 0 or more, got 'x'"),
        (["args", "--nproc=2"], "--nproc: only train, check, infer and migrate take it, args does not"),
        (["train", *NEEDED, "--train.lrr=1"], "train.lrr: unknown argument; did you mean train.lr?"),
        (["train", "none.yaml"], "none.yaml: No such file or directory"),
    ],
)
def test_a_wrong_command_is_one_line_and_status_2(
    argv: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"tutti: error: {error}\n"


def test_sizes_are_checked_against_the_world_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", *NEEDED, "train.global_batch_size=3"]
    assert main([*argv, "--nproc", "2"]) == 2
    assert "2 or 4 would" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(argv) == 2
    assert "4 would" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["train", *NEEDED], ["infer", "infer.model_path=x", "--prompt", "Hi"]])
def test_half_of_a_launchers_environment_is_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(argv) == 2
    assert capsys.readouterr().err == (
        "tutti: error: WORLD_SIZE: is 4, but RANK is not set; start ranks by torchrun or --nproc, or unset WORLD_SIZE\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert main(argv) == 2
    assert "WORLD_SIZE: the environment has 'four' for it" in capsys.readouterr().err


def test_what_follows_an_option_that_takes_a_value_is_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    module = ModuleType("tutti.infer.run")
    module.InferenceJob = lambda *parts: parts  # type: ignore[attr-defined]
    module.infer = lambda config, job: seen.append((config.infer.chat_template, job))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tutti.infer.run", module)
    texts = ["-h", "--help", "--nproc=3", "--debug", "-5 degrees", "--prompt", "a=b", "", "--infer.seed 3"]
    argv = [word for text in texts for word in ("--prompt", text)]
    assert main(["infer", "infer.model_path=x", "--infer.chat_template", "-h/x", *argv, "--prompt=-h"]) == 0
    assert seen == [("-h/x", ((*texts, "-h"), None, None, (), False))]


def test_overrides_pass_through_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    replace_run(monkeypatch, seen.append)
    words = ["--debug", "--train.lr", "-1e-5", "--train.dyn_bsz", "--train.wandb_name", "-h"]
    asked = "Hello, who are you?"
    assert main(["--debug", "train", *NEEDED, *words[3:], "--train.sample_prompts", asked, "--nproc", "1"]) == 0
    train = seen[0].train
    assert (train.dyn_bsz, train.wandb_name, train.sample_prompts) == (True, "-h", (asked,))
    assert main(["train", *NEEDED, *words]) == 2, "a rate below 0 reaches the check of its range"


def test_train_gets_the_resolved_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Config] = []
    replace_run(monkeypatch, seen.append)
    assert main(["train", *NEEDED, "--train.micro_batch_size", "3"]) == 0
    assert seen[0].train.global_batch_size == 3
    assert seen[0].model.tokenizer_path == "qwen"
    assert "train.global_batch_size" not in seen[0].explicit


def test_check_looks_at_the_ranks_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []
    module = ModuleType("tutti.check.run")
    module.check = lambda config, world: seen.append((config.train.global_batch_size, world))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tutti.check.run", module)
    assert main(["check", *NEEDED]) == 0
    assert main(["check", *NEEDED, "--nproc", "64"]) == 0
    assert seen == [(1, 1), (64, 64)]


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("data.train_path: no rows"), 1, "tutti: error: data.train_path: no rows\n"),
        (FileNotFoundError(2, "No such file or directory", "rows.jsonl"), 1, "tutti: error: rows.jsonl: No such file"),
        (OSError("disk is full"), 1, "tutti: error: disk is full\n"),
    ],
)
def test_a_failed_run_is_one_line_and_status_1(
    error: Exception,
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace_run(monkeypatch, fail_with(error))
    assert main(["train", *NEEDED]) == status
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert shown.count("\n") == 1
    assert main(["train", *NEEDED, "--debug"]) == status
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert text in shown


def test_a_mistake_of_ours_comes_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_run(monkeypatch, fail_with(AssertionError("the layout was not validated")))
    assert main(["train", *NEEDED]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback")
    assert shown.endswith("tutti: error: AssertionError: the layout was not validated\n")


def test_an_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: Config) -> None:
        raise KeyboardInterrupt

    replace_run(monkeypatch, train)
    assert main(["train", *NEEDED]) == 130
    assert capsys.readouterr().err == ""


def test_warnings_are_shown_by_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    replace_run(monkeypatch, lambda config: None)
    argv = ["train", *NEEDED, "train.lr_start=1e-6"]
    shown = "tutti: warning: train.lr_start: has no effect: train.lr_warmup_ratio is 0\n"
    assert main(argv) == 0
    assert capsys.readouterr().err == shown
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in [("0", shown), ("1", "")]:
        monkeypatch.setenv("RANK", rank)
        assert main(argv) == 0
        assert capsys.readouterr().err == expected
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TUTTI_ERROR_FILE", str(tmp_path / "note"))
    assert main(argv) == 0
    assert capsys.readouterr().err == ""


def test_a_rank_leaves_its_error_to_the_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    replace_run(monkeypatch, fail_with(ValueError("no rows")))
    monkeypatch.setenv("TUTTI_ERROR_FILE", str(tmp_path / "note"))
    assert main(["train", *NEEDED]) == 1
    assert capsys.readouterr().err == ""
    assert (tmp_path / "note").read_text() == "tutti: error: no rows\n"


def test_under_torchrun_a_configuration_error_is_shown_by_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, lines in [("0", 3), ("1", 0)]:
        monkeypatch.setenv("RANK", rank)
        assert main(["train"]) == 2
        assert len(capsys.readouterr().err.splitlines()) == lines
    assert main(["train", *NEEDED, "--nproc", "2"]) == 2


def test_nproc_starts_ranks(tmp_path: Path) -> None:
    """Real ranks with a stand-in for the run: what they get, and that an error of both is shown once."""
    package = tmp_path / "stand_in"
    package.mkdir()
    (package / "sitecustomize.py").write_text(
        "import os, sys, types\n"
        "module = types.ModuleType('tutti.train.run')\n"
        "def train(config):\n"
        "    open(os.path.join(config.train.output_dir, os.environ['RANK']), 'w').write(os.environ['WORLD_SIZE'])\n"
        "    if config.train.seed == 13:\n"
        "        raise ValueError('train.seed: unlucky')\n"
        "module.train = train\n"
        "sys.modules['tutti.train.run'] = module\n"
    )
    argv = ["train", *NEEDED, f"train.output_dir={tmp_path}", "--nproc", "2", "train.lr_start=1e-6"]
    done = run(*argv, PYTHONPATH=str(package))
    assert done.returncode == 0
    assert done.stderr.count("\n") == done.stderr.count("warning: train.lr_start") == 1
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
    done = run(*argv[:-1], "--train.seed", "13", PYTHONPATH=str(package))
    assert (done.returncode, done.stderr) == (1, "tutti: error: train.seed: unlucky\n")
    done = run(*argv[:-1], "--train.seed", "13", "--debug", PYTHONPATH=str(package))
    assert done.stderr.count("Traceback") == 1


def test_a_crash_is_followed_by_a_restart_from_the_newest_checkpoint(tmp_path: Path) -> None:
    """Ranks of a stand-in for the run: it crashes before it begins, crashes after, and then fails for good."""
    package = tmp_path / "stand_in"
    package.mkdir()
    (package / "sitecustomize.py").write_text(
        "import os, pathlib, sys, types\n"
        "module = types.ModuleType('tutti.train.run')\n"
        "def train(config):\n"
        "    from tutti.checkpoint.lineage import Start, write_start\n"
        "    tries = pathlib.Path(config.train.output_dir, 'tries')\n"
        "    with tries.open('a') as stream:\n"
        "        stream.write(f'{config.train.load_checkpoint_path} ')\n"
        "    number = len(tries.read_text().split())\n"
        "    if number == config.train.seed:\n"
        "        raise ValueError('data.train_path: bad')\n"
        "    if number == 2:\n"
        "        write_start(pathlib.Path(config.train.output_dir, 'checkpoints'), Start())\n"
        "    if number < 4:\n"
        "        os.kill(os.getpid(), 9)\n"
        "module.train = train\n"
        "sys.modules['tutti.train.run'] = module\n"
    )
    argv = ["train", *NEEDED, f"train.output_dir={tmp_path}", "--max-restarts", "3"]
    done = run(*argv, PYTHONPATH=str(package))
    assert done.returncode == 0 and (tmp_path / "tries").read_text() == "None None auto auto "
    lines = done.stderr.splitlines()
    assert lines[1] == "tutti: restart 1 of 3: it had not begun"
    assert lines[3] == f"tutti: restart 2 of 3: going on from the newest checkpoint in {tmp_path}/checkpoints"
    # A run that reports an error before it begins is not restarted, and there are at most the requested restarts.
    for options, tries, status in ((["train.seed=1"], 1, 1), (["--max-restarts=1"], 2, 137)):
        (tmp_path / "tries").unlink()
        done = run(*argv, *options, PYTHONPATH=str(package))
        assert (done.returncode, len((tmp_path / "tries").read_text().split())) == (status, tries)


def test_args_in_a_terminal_is_a_table_that_fits() -> None:
    parent, child = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "LINES": "40", "TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tutti", "args", "train.lr"], cwd=ROOT, stdout=child, env=environment, close_fds=True
    )
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    lines = shown.decode().replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()
    assert lines[0].split()[:3] == ["name", "type", "default"]
    assert any(line.startswith("train.lr_warmup_ratio") for line in lines)
    assert max(map(len, lines)) <= 100


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m tutti args --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_a_process_with_torch_ends_before_the_interpreter_is_taken_apart() -> None:
    """Exit handlers run and output is flushed, but nothing after that can abort the process."""
    code = """
import atexit, os, sys
import torch
from tutti.__main__ import run

class Aborts:
    def __del__(self, abort=os.abort):
        abort()

left = Aborts()
atexit.register(print, "registered", end="")
sys.argv = ["tutti", "--version"]
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\nregistered"), done.stderr
