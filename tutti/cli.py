"""The command `tutti`: its verbs, whose modules are imported when they run, and uniform error reports.

A command line is a verb, its options and the rest: for most verbs a configuration (`FILE.yaml`, `--train.lr 1e-5`,
`train.lr=1e-5`), which `tutti.config.load` reads. argparse takes the options and leaves the rest in order.

Help, the reference of arguments and configuration errors are fast, because nothing here imports torch: the
configuration is read, and its sizes are checked against the number of ranks, before the training code is loaded.

Exit status: 0 done; 1 the run failed; 2 the command or the configuration is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tutti import __version__
from tutti.config import ARGUMENTS, Config, ConfigError
from tutti.core.launch import ERROR_FILE, launch

_CONFIGURED = """
The configuration is one YAML file, then overrides, where later ones win; both are optional:

  --train.lr 1e-5      --train.lr=1e-5      train.lr=1e-5
  --train.dyn_bsz                           a switch without a value is true
  --train.no_decay_params bias,norm         a list
  --model.config_path none                  no value

`tutti args` lists all arguments, `tutti args train.lr` those that begin with train.lr."""

_ABOUT = "Tutti trains any model of the Hugging Face ecosystem on any number of processes, from one YAML."

_EPILOG = """\
  tutti VERB --help    help on a verb
  tutti --version

examples:
  tutti train run.yaml
  tutti train run.yaml --train.lr 1e-5 --train.dyn_bsz --nproc 2
  torchrun --nproc-per-node 8 -m tutti train run.yaml
"""

_SETTINGS = "[FILE.yaml] [--a.b VALUE | a.b=VALUE ...]"

_MEDIA = ("image", "video", "audio")
"""The kinds of media that `tutti infer` accepts as options."""

_VALUED = ("--prompt", *(f"--{kind}" for kind in _MEDIA), "--input", "--output", "--nproc", "--max-restarts", "-o")
"""Options that take the next word as their value, whatever it is."""


class _Command(NamedTuple):
    """A parsed command line. words: all except the launcher's. rest: those that are not options of the verb."""

    words: list[str]
    rest: list[str]
    options: argparse.Namespace
    nproc: int | None
    max_restarts: int = 0


class _Verb(NamedTuple):
    """A verb and its help. usage: the words after it. options: argparse settings of each option, by name."""

    run: Callable[[_Command], int]
    usage: str
    brief: str
    text: str
    options: dict[str, dict[str, Any]]
    examples: Sequence[str]


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except BrokenPipeError:
        # The reader of the output (`tutti args | head`) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _report(error, debug="--debug" in argv)
        return 2 if isinstance(error, ConfigError) else 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        _parser().print_help()
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    words = _with_values_bound(argv)
    name = next((word for word in words if not word.startswith("-")), "")
    if name not in _VERBS:
        from tutti.config.coerce import nearest

        guess = nearest(name, list(_VERBS))
        hint = f"did you mean {guess}?" if guess else "see tutti --help"
        raise ConfigError([f"there is no command {name!r}; {hint}"])
    words.remove(name)
    options, rest = _parser().parse_known_args([name, *words])
    if options.help:
        options.parser.print_help()
        return 0
    nproc = None if options.nproc is None else _number("--nproc", options.nproc, "a number of ranks", 1)
    if nproc is not None and "--nproc" not in _VERBS[name].options:
        raise ConfigError([f"--nproc: only train, check, infer and migrate take it, {name} does not"])
    restarts = _number("--max-restarts", getattr(options, "max_restarts", "0"), "a number of restarts", 0)
    kept = [word for word in words if not word.startswith(("--nproc=", "--max-restarts="))]
    return _VERBS[name].run(_Command([name, *kept], rest, options, nproc, restarts))


def _with_values_bound(argv: list[str]) -> list[str]:
    """Join an option and its value in `argv` with "=" if the value could be mistaken for an option."""
    bound, left = [], deque(argv)
    while left:
        word = left.popleft()
        argument = ARGUMENTS.get(word.removeprefix("--"))
        if word in _VALUED:
            if not left and word not in ("--nproc", "--max-restarts"):
                raise ConfigError([f"{word}: needs a value"])
            word += "=" + (left.popleft() if left else "")
        elif argument is not None and argument.kind is not bool and left and re.match("-[^-]", left[0]):
            word += "=" + left.popleft()
        bound.append(word)
    return bound


def _parser() -> _Parser:
    """Make the parser of all verbs, which leaves unknown words to them."""
    listed = "\n".join(f"  {name:<8} {verb.brief}" for name, verb in _VERBS.items())
    parser = _Parser(prog="tutti", usage="tutti VERB ...", description=_ABOUT, epilog=f"{listed}\n\n{_EPILOG}")
    verbs = parser.add_subparsers(help=argparse.SUPPRESS)
    for name, verb in _VERBS.items():
        examples = "".join(f"\n  tutti {name} {example}" for example in verb.examples)
        own = verbs.add_parser(
            name,
            usage=f"tutti {name} {verb.usage}",
            description=verb.text,
            epilog=f"example{'s' * (len(verb.examples) > 1)}:{examples}",
        )
        for option, settings in verb.options.items():
            own.add_argument(option, **settings)
        if "--nproc" not in verb.options:
            own.add_argument("--nproc", help=argparse.SUPPRESS)
        own.add_argument("--debug", action="store_true", help="show the traceback of an error")
        own.add_argument("--help", "-h", action="store_true", help="show this")
        own.set_defaults(parser=own)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse's parser, with line breaks in help preserved, and our errors."""

    def __init__(self, **settings: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=20, width=120)
        super().__init__(**settings, formatter_class=layout, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError([message])


def _number(option: str, value: str, what: str, low: int) -> int:
    if not value.isdecimal() or int(value) < low:
        raise ConfigError([f"{option}: expects {what}, {low} or more, got {value!r}"])
    return int(value)


def _train(command: _Command) -> int:
    _refuse_nproc_in_rank(command)
    config = _configure(command, command.nproc or _world())
    if (command.nproc or 1) > 1 or command.max_restarts:
        from tutti.train.restart import restarts

        again = restarts(_as_rank(command), Path(config.train.output_dir or ""), command.max_restarts)
        return launch(_as_rank(command), command.nproc or 1, again)

    from tutti.train.run import train

    train(config)
    return 0


def _check(command: _Command) -> int:
    world = command.nproc or _environment_number("WORLD_SIZE")
    config = _configure(command, world)

    from tutti.check.run import check

    check(config, world)
    return 0


def _export(command: _Command) -> int:
    if len(command.rest) != 2:
        given = " ".join(command.rest) or "neither"
        raise ConfigError([f"export: takes CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER, got {given}"])

    from tutti.kinds.export import export

    export(*command.rest, merge_adapters=command.options.merge)
    return 0


def _args(command: _Command) -> int:
    from tutti.config import docs

    options, prefixes = command.options, [word for word in command.rest if not word.startswith("--")]
    unknown = [word for word in command.rest if word.startswith("--")] + prefixes[1:]
    if unknown:
        takes = "it takes [PREFIX] [--json | --markdown | --schema]"
        raise ConfigError([f"args: unexpected {word}; {takes}" for word in unknown])
    if options.markdown or options.schema:
        print(docs.as_markdown() if options.markdown else docs.as_schema(), end="")
        return 0
    arguments = docs.select(*prefixes or [""])
    if not arguments:
        raise ConfigError([f"{prefixes[0]}: no argument begins so"])
    if options.json:
        print(docs.as_json(arguments))
    elif sys.stdout.isatty():
        docs.print_table(arguments)
    else:
        print(docs.as_lines(arguments))
    return 0


def _infer(command: _Command) -> int:
    from tutti.config.coerce import expand_path
    from tutti.config.load import load

    _refuse_nproc_in_rank(command)
    options = command.options
    problems = [f"--{name}: can be given once" for name in ("input", "output") if len(getattr(options, name)) > 1]
    if bool(options.input) != bool(options.output) and not options.prompt:
        problems.append("--input and --output belong together: the rows to answer, and where the answers go")
    if options.prompt and options.input:
        problems.append("--prompt: either prompts or --input, not both")
    if options.media and options.input:
        problems.append(f"--{options.media[0][0]}: goes with --prompt or a conversation; rows name their own media")
    problems += [f"--{kind}: there is no file {path}" for kind, path in options.media if not Path(path).is_file()]
    try:
        config = load(command.rest, "infer")
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    _warn(config)
    if command.nproc is not None and command.nproc > 1:
        return launch(_as_rank(command), command.nproc)
    _world()

    from tutti.infer.run import InferenceJob, infer

    source, output = (expand_path(files[0]) if files else None for files in (options.input, options.output))
    job = InferenceJob(tuple(options.prompt), source, output, tuple(options.media), options.draw)
    infer(config, job)
    return 0


def _init(command: _Command) -> int:
    if len(command.rest) != 1 or command.rest[0].startswith("-"):
        raise ConfigError([f"init: takes the name of a new folder, got {' '.join(command.rest) or 'none'}"])

    from tutti.project import make_project

    (folder,) = command.rest
    for file in make_project(Path(folder)):
        print(f"  {folder.rstrip('/')}/{file}")
    print(f"\nnext: cd {folder} && tutti train config.yaml")
    return 0


def _launch(command: _Command) -> int:
    from tutti.cluster.job import read_job
    from tutti.cluster.render import RENDER

    asked = [name for name in RENDER if getattr(command.options, name)]
    if len(command.rest) != 1 or command.rest[0].startswith("-") or len(asked) != 1:
        given = " ".join(command.words[1:]) or "neither"
        raise ConfigError(
            [f"launch: takes JOB.yaml and one of {', '.join(f'--{name}' for name in RENDER)}, got {given}"]
        )
    print(RENDER[asked[0]](read_job(command.rest[0])), end="")
    return 0


def _migrate(command: _Command) -> int:
    out = command.options.o
    if len(command.rest) != 1 or command.rest[0].startswith("-") or len(out) > 1:
        given = " ".join(command.words[1:]) or "neither"
        raise ConfigError([f"migrate: takes FILE.yaml [-o OUT.yaml], got {given}"])

    from tutti.migrate import migrate
    from tutti.migrate.show import account, as_yaml

    (path,) = command.rest
    if out and Path(out[0]).exists():
        raise ConfigError([f"-o: {out[0]} exists already; give the name of a new file"])
    migration = migrate(path, command.nproc or 1)
    text = as_yaml(migration, path)
    if not out:
        print(account(migration, path), file=sys.stderr)
        print(text, end="")
        return 0
    Path(out[0]).write_text(text, encoding="utf-8")
    print(account(migration, path))
    print(f"wrote {out[0]}; next: tutti check {out[0]}")
    return 0


def _medium(kind: str, path: str) -> tuple[str, str]:
    """The value of a media option."""
    return kind, os.path.expanduser(path)


def _nproc(text: str) -> dict[str, dict[str, Any]]:
    return {"--nproc": {"metavar": "N", "help": text}}


_VERBS = {
    "train": _Verb(
        run=_train,
        usage=f"{_SETTINGS} [--nproc N] [--max-restarts N]",
        brief="train a model",
        text="Train a model, and write metrics, a report, checkpoints and a Hugging Face folder to train.output_dir.\n"
        + _CONFIGURED,
        options={
            **_nproc("start N ranks on this machine; for several machines see tutti launch"),
            "--max-restarts": {
                "metavar": "N",
                "default": "0",
                "help": "restart up to N times after a crash, from the newest checkpoint",
            },
        },
        examples=(
            "run.yaml",
            "--model.model_path Qwen/Qwen3-0.6B --data.train_path chat.jsonl --train.output_dir runs/first",
            "runs/first/config.yaml --train.load_checkpoint_path auto",
        ),
    ),
    "check": _Verb(
        run=_check,
        usage=f"{_SETTINGS} [--nproc N]",
        brief="show a run's data, batches, sizes and memory without training",
        text="""\
Read the configuration and the data as a run would, and show the first batch with its loss mask, rows kept and dropped,
steps and tokens, the parallel plan, and the memory and traffic per rank of a step. Nothing is trained.
"""
        + _CONFIGURED,
        options=_nproc("show a run of N ranks; none of them is started"),
        examples=("run.yaml", "run.yaml --nproc 64"),
    ),
    "export": _Verb(
        run=_export,
        usage="CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER [--merge]",
        brief="make a Hugging Face folder from a checkpoint",
        text="""\
Make a complete Hugging Face folder (config, weights, tokenizer) from a training checkpoint: a folder
.../checkpoints/global_step_N, or a run's output_dir, whose newest complete checkpoint is used. For a run that trained
adapters (train.architecture lora) it makes an adapter folder in peft's format.""",
        options={
            "--merge": {
                "action": "store_true",
                "help": "merge the adapters (of a run, or of an adapter folder) into the base model, and write that",
            }
        },
        examples=("runs/first runs/first/hf/final", "runs/lora runs/lora/hf/merged --merge"),
    ),
    "init": _Verb(
        run=_init,
        usage="FOLDER",
        brief="create a small project to start from",
        text="""\
Create a small project to start from: a commented config.yaml, conversations to train on, and a tiny model's config. It
runs unchanged, on a CPU, in about a minute.""",
        options={},
        examples=("songs && cd songs && tutti train config.yaml",),
    ),
    "launch": _Verb(
        run=_launch,
        usage="JOB.yaml --slurm | --k8s | --sky",
        brief="make a job file for a cluster",
        text="""\
Make the file with which a scheduler runs a training on several machines, from one YAML that describes the job: a script
for Slurm, a TrainJob for Kubeflow Trainer, or a task for SkyPilot. It is written to standard output, and nothing is
submitted. docs/cluster.md lists the keys.""",
        options={
            "--slurm": {"action": "store_true", "help": "a script for sbatch"},
            "--k8s": {"action": "store_true", "help": "a TrainJob for kubectl apply"},
            "--sky": {"action": "store_true", "help": "a task for sky jobs launch"},
        },
        examples=("job.yaml --slurm > job.sh && sbatch job.sh",),
    ),
    "migrate": _Verb(
        run=_migrate,
        usage="FILE.yaml [-o OUT.yaml] [--nproc N]",
        brief="convert the configuration of another framework",
        text="""\
Convert a configuration of VeOmni, LLaMA-Factory, Axolotl, TRL, transformers' Trainer (YAML or JSON) or torchtitan
(TOML) to ours, and list every key: what it is mapped to, what changed in meaning and how, and what has no
counterpart.""",
        options={
            "-o": {
                "metavar": "OUT.yaml",
                "action": "append",
                "default": [],
                "help": "the new file; without it the YAML goes to standard output and the list to standard error",
            },
            **_nproc(
                "the number of ranks (GPUs) that the file was made for (default: 1): a global batch counts all of them"
            ),
        },
        examples=("llama3_lora_sft.yaml -o run.yaml --nproc 8",),
    ),
    "args": _Verb(
        run=_args,
        usage="[PREFIX] [--json | --markdown | --schema]",
        brief="list the arguments of a configuration",
        text="""\
List the arguments with name, type, default and description. PREFIX is the beginning of a dotted name (train.lr) or of a
name within its group (lr).""",
        options={
            "--json": {"action": "store_true", "help": "as a list of JSON objects"},
            "--markdown": {"action": "store_true", "help": "as the page docs/arguments.md"},
            "--schema": {"action": "store_true", "help": "as a JSON Schema, with which an editor completes a YAML"},
        },
        examples=("train.save", "--schema > tutti.schema.json"),
    ),
    "infer": _Verb(
        run=_infer,
        usage="""\
[FILE.yaml] --infer.model_path PATH [--a.b VALUE | a.b=VALUE ...] [--nproc N]
                   [[--image FILE ...] [--prompt TEXT ...] | --input FILE.jsonl --output FILE.jsonl] [--draw]""",
        brief="chat with a model, or have it answer prompts",
        text="""\
Generate text with a model: a Hugging Face folder, an adapter folder (on the base that it names, or model.model_path),
a name of either on the hub (org/name), a training checkpoint (.../checkpoints/global_step_N), or a run's output_dir.
Without --prompt and --input this starts a chat (/help lists its commands); you can also pipe in one message per line.

`tutti args infer` lists the arguments: sampling, length, seed.""",
        options={
            "--prompt": {
                "metavar": "TEXT",
                "action": "append",
                "default": [],
                "help": "answer this and exit; may be given several times",
            },
            **{
                f"--{kind}": {
                    "metavar": "FILE",
                    "action": "append",
                    "dest": "media",
                    "type": partial(_medium, kind),
                    "default": [],
                    "help": f"{kind} to put before each prompt, or the first message; may be given several times",
                }
                for kind in _MEDIA
            },
            "--input": {
                "metavar": "FILE",
                "action": "append",
                "default": [],
                "help": 'answer the rows of a file ({"prompt": ...} or {"messages": [...]}) into the file given by '
                "--output; after an interruption, the same command continues",
            },
            "--output": {
                "metavar": "FILE",
                "action": "append",
                "default": [],
                "help": "the new file of answers; with a diffusion model, the folder of the pictures drawn",
            },
            "--draw": {
                "action": "store_true",
                "help": "start each answer with a picture",
            },
            **_nproc("shard a model that is too large for one device over N ranks"),
        },
        examples=(
            '--infer.model_path runs/first --prompt "What is the capital of Sweden?"',
            '--infer.model_path Qwen/Qwen2.5-VL-3B-Instruct --image cat.jpg --prompt "What is this?"',
            "--infer.model_path runs/first --infer.do_sample false --input ask.jsonl --output answers.jsonl",
            "--infer.model_path runs/first",
        ),
    ),
}


def _refuse_nproc_in_rank(command: _Command) -> None:
    for option, value in (("--nproc", command.nproc), ("--max-restarts", command.max_restarts)):
        if value and "RANK" in os.environ:
            raise ConfigError(
                [f"{option}: this process is a rank already (RANK is set); use torchrun or {option}, not both"]
            )


def _as_rank(command: _Command) -> list[str]:
    """The command line of one rank of the command."""
    return [sys.executable, "-m", "tutti", *command.words]


def _world() -> int:
    """The number of ranks that torchrun (or the launcher) started, else 1."""
    size = _environment_number("WORLD_SIZE")
    if size > 1 and "RANK" not in os.environ:
        raise ConfigError(
            [f"WORLD_SIZE: is {size}, but RANK is not set; start ranks by torchrun or --nproc, or unset WORLD_SIZE"]
        )
    return size


def _environment_number(name: str) -> int:
    value = os.environ.get(name, "1")
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError([f"{name}: the environment has {value!r} for it, which is no number of ranks"])
    return int(value)


def _configure(command: _Command, world: int) -> Config:
    """The configuration for `world` ranks; one process prints its warnings."""
    from tutti.config.layout import resolve_sizes
    from tutti.config.load import load

    try:
        config = load(command.rest, command.words[0])
    except ConfigError as error:
        raise ConfigError(error.problems + _whose(command.rest)) from None
    config = resolve_sizes(config, world)
    _warn(config)
    return config


def _whose(words: Sequence[str]) -> list[str]:
    """An advice line if a file among `words` belongs to another framework."""
    from tutti.migrate import recognised

    for path in (word for word in words if os.path.isfile(word)):
        if framework := recognised(path):
            return [f"{path}: has keys of {framework}; `tutti migrate {path} -o run.yaml` makes one of ours of it"]
    return []


def _warn(config: Config) -> None:
    """Print which settings have no effect."""
    from tutti.config.rules import warnings

    if _speaks():
        for warning in warnings(config):
            print(f"tutti: warning: {warning}", file=sys.stderr)


def _speaks() -> bool:
    """True for the one process that prints what every rank knows: rank 0, or the launcher."""
    return os.environ.get("RANK", "0") == "0" and ERROR_FILE not in os.environ


def _report(error: Exception, *, debug: bool) -> None:
    """Print what went wrong: one line per problem, with a traceback on request or if the mistake is ours."""
    if getattr(error, "reported", False):  # by the rank that found it
        return
    if isinstance(error, ConfigError):
        problems = error.problems
    elif isinstance(error, OSError) and error.filename and error.strerror:
        problems = [f"{error.filename}: {error.strerror}"]
    elif isinstance(error, ValueError | OSError):
        problems = [str(error)]
    else:
        problems = [f"{type(error).__name__}: {error}"]
    text = "".join(f"tutti: error: {problem}\n" for problem in problems)
    if debug or not isinstance(error, ValueError | OSError):
        text = "".join(traceback.format_exception(error)) + text
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows the earliest one, and passes it on
        known = {"message": text.strip(), "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": known}), encoding="utf-8")
    if ERROR_FILE in os.environ:
        Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")
    elif _speaks() or not isinstance(error, ConfigError):
        sys.stderr.write(text)
