"""The command `tutti`: verbs, each of which imports what it needs when it runs, and one way to report errors.

Help, the reference of arguments and configuration errors answer at once, because nothing here imports torch: the
configuration is read, and its sizes are checked against the number of ranks, before the training code is loaded.

Exit status: 0 done; 1 the run failed; 2 the command or the configuration is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tutti.config import Config, ConfigError
from tutti.core.launch import ERROR_FILE, launch

_HELP = """\
Tutti trains any model of the Hugging Face ecosystem on any number of processes, from one YAML.

usage: tutti VERB ...

  train   [FILE.yaml] [--a.b VALUE | a.b=VALUE ...] [--nproc N]    train a model
  check   [FILE.yaml] [--a.b VALUE | a.b=VALUE ...] [--nproc N]    look at its data, batches, sizes and memory first
  export  CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER [--merge]            make a Hugging Face folder of a checkpoint
  init    FOLDER                                                   write a small project that runs, to start from
  migrate FILE.yaml [-o OUT.yaml] [--nproc N]                      turn a YAML of another framework into ours
  args    [PREFIX] [--json | --markdown]                           list the arguments of a configuration
  infer   [FILE.yaml] [--infer.b VALUE ...] [--prompt TEXT | --input FILE --output FILE] [--nproc N]
                                                                   talk to a model, or let it answer prompts

  --debug    with any verb: show the traceback of an error
  --help     with a verb: more about it
  --version

examples:
  tutti train run.yaml
  tutti train run.yaml --train.lr 1e-5 --train.dyn_bsz --nproc 2
  torchrun --nproc-per-node 8 -m tutti train run.yaml
"""

_CONFIGURED = """\
The configuration is one YAML file, then overrides, of which the later wins; both are optional:

  --train.lr 1e-5      --train.lr=1e-5      train.lr=1e-5
  --train.dyn_bsz                           a switch alone is true
  --train.no_decay_params bias,norm         a list
  --model.config_path none                  no value

`tutti args` lists all arguments, `tutti args train.lr` those that begin so."""

_TRAIN_HELP = f"""\
usage: tutti train [FILE.yaml] [--a.b VALUE | a.b=VALUE ...] [--nproc N]

Train a model, and write metrics, a report, checkpoints and a Hugging Face folder to train.output_dir.

{_CONFIGURED}

  --nproc N    start N ranks on this machine; for several machines use torchrun ... -m tutti train

examples:
  tutti train run.yaml
  tutti train --model.model_path Qwen3-0.6B --data.train_path chat.jsonl --train.output_dir runs/first
  tutti train runs/first/config.yaml --train.load_checkpoint_path auto
"""

_CHECK_HELP = f"""\
usage: tutti check [FILE.yaml] [--a.b VALUE | a.b=VALUE ...] [--nproc N]

Read the configuration and the data as a run would, and show the first batch with its loss mask, rows kept and dropped,
steps and tokens, the parallel plan, and the memory and traffic that a step takes of each rank. Nothing is trained.

{_CONFIGURED}

  --nproc N    look at a run of N ranks; none of them is started

examples:
  tutti check run.yaml
  tutti check run.yaml --nproc 64
"""

_EXPORT_HELP = """\
usage: tutti export CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER [--merge]

Make a complete Hugging Face folder (config, weights, tokenizer) of a training checkpoint: a folder
.../checkpoints/global_step_N, or a run's output_dir, whose newest whole checkpoint is taken. Of a run that trained
adapters (train.architecture lora) it makes an adapter folder, which peft reads as well.

  --merge    add the adapters to the base model instead, and write it complete

examples:
  tutti export runs/first runs/first/hf/final
  tutti export runs/lora runs/lora/hf/merged --merge
"""

_INFER_HELP = """\
usage: tutti infer [FILE.yaml] --infer.model_path PATH [--a.b VALUE | a.b=VALUE ...] [--nproc N]
                   [--prompt TEXT ... | --input FILE.jsonl --output FILE.jsonl]

Generate text with a model: a Hugging Face folder, an adapter folder (on the base that it names, or model.model_path),
a training checkpoint (.../checkpoints/global_step_N), or a run's output_dir.

  --prompt TEXT    answer this and end; may be given several times
  --input FILE     answer its rows ({"prompt": ...} or {"messages": [...]}) into the file given by --output; when
                   interrupted, the same command goes on
  (neither)        talk: answers come as they are made, /help lists the commands; or pipe in a message a line

  --nproc N        divide a model that is too large for one device among N ranks

`tutti args infer` lists the arguments: sampling, length, seed.

examples:
  tutti infer --infer.model_path runs/first --prompt "What is the capital of Sweden?"
  tutti infer --infer.model_path runs/first --infer.do_sample false --input ask.jsonl --output answers.jsonl
  tutti infer --infer.model_path runs/first
"""

_INIT_HELP = """\
usage: tutti init FOLDER

Write a small project to start from: a commented config.yaml, conversations to train on, and a tiny model's config. It
runs as it is, on a CPU, in about a minute.

example:
  tutti init songs && cd songs && tutti train config.yaml
"""

_MIGRATE_HELP = """\
usage: tutti migrate FILE.yaml [-o OUT.yaml] [--nproc N]

Turn a training YAML of VeOmni, LLaMA-Factory or Axolotl into ours, and list every key of it: what it is mapped to, what
changed its meaning and how, and what has no counterpart.

  -o OUT.yaml    the new file to write; without, the YAML goes to standard output and the list to standard error
  --nproc N      the number of ranks (GPUs) that the file was made for (default: 1): a global batch counts all of them

example:
  tutti migrate llama3_lora_sft.yaml -o run.yaml --nproc 8
"""

_ARGS_HELP = """\
usage: tutti args [PREFIX] [--json | --markdown]

List the arguments: name, type, default, and what it is. PREFIX is the beginning of a dotted name (train.lr) or of a
name within its group (lr).

examples:
  tutti args train.save
  tutti args --json
"""


class _Command(NamedTuple):
    """A command line, taken apart: the verb, its arguments, and the options that are not arguments of a run."""

    verb: str
    argv: list[str]
    nproc: int | None
    debug: bool
    help: bool


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's); the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except BrokenPipeError:
        # Whoever read the output (`tutti args | head`) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _report(error, debug="--debug" in argv)
        return 2 if isinstance(error, ConfigError) else 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(version("tutti"))
        return 0
    command = _parse(argv)
    if command.verb not in _VERBS:
        from tutti.config.coerce import nearest

        guess = nearest(command.verb, list(_VERBS))
        hint = f"did you mean {guess}?" if guess else "see tutti --help"
        raise ConfigError([f"there is no command {command.verb!r}; {hint}"])
    run, text = _VERBS[command.verb]
    if command.help:
        print(text, end="")
        return 0
    if command.nproc is not None and command.verb not in ("train", "check", "infer", "migrate"):
        raise ConfigError([f"--nproc: only train, check, infer and migrate take it, {command.verb} does not"])
    return run(command)


def _parse(argv: list[str]) -> _Command:
    debug, help, nproc = False, False, None
    rest: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--debug":
            debug = True
        elif token in ("--help", "-h"):
            help = True
        elif token == "--nproc" or token.startswith("--nproc="):
            nproc = _number(token.partition("=")[2] or next(tokens, ""))
        else:
            rest.append(token)
    return _Command(rest[0] if rest else "", rest[1:], nproc, debug, help)


def _number(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError([f"--nproc: expects a number of ranks, 1 or more, got {value!r}"])
    return int(value)


def _train(command: _Command) -> int:
    _refuse_nproc_in_rank(command)
    config = _configure(command, command.nproc or _world())
    if command.nproc is not None and command.nproc > 1:
        return _launch(command)

    from tutti.train.run import train

    train(config)
    return 0


def _check(command: _Command) -> int:
    world = command.nproc or _world()
    config = _configure(command, world)

    from tutti.check.run import check

    check(config, world)
    return 0


def _export(command: _Command) -> int:
    paths = [token for token in command.argv if token != "--merge"]
    if len(paths) != 2:
        raise ConfigError([f"export: takes CHECKPOINT_OR_OUTPUT_DIR OUT_FOLDER, got {' '.join(paths) or 'neither'}"])

    from tutti.checkpoint.export import export

    export(*paths, merge_adapters="--merge" in command.argv)
    return 0


def _args(command: _Command) -> int:
    from tutti.config import docs

    options = [token for token in command.argv if token.startswith("--")]
    prefixes = [token for token in command.argv if not token.startswith("--")]
    unknown = [option for option in options if option not in ("--json", "--markdown")] + prefixes[1:]
    if unknown:
        raise ConfigError([f"args: unexpected {token}; it takes [PREFIX] [--json | --markdown]" for token in unknown])
    if "--markdown" in options:
        print(docs.as_markdown(), end="")
        return 0
    arguments = docs.select(*prefixes or [""])
    if not arguments:
        raise ConfigError([f"{prefixes[0]}: no argument begins so"])
    if "--json" in options:
        print(docs.as_json(arguments))
    elif sys.stdout.isatty():
        docs.print_table(arguments)
    else:
        print(docs.as_lines(arguments))
    return 0


def _infer(command: _Command) -> int:
    from tutti.config.load import load

    _refuse_nproc_in_rank(command)
    rest, options = _take_options(command.argv, ("--prompt", "--input", "--output"))
    given = {name: values for name, values in options.items() if values}
    problems = [f"{name}: can be given once" for name in ("--input", "--output") if len(options[name]) > 1]
    if ("--input" in given) != ("--output" in given):
        problems.append("--input and --output belong together: the rows to answer, and where the answers go")
    if "--prompt" in given and "--input" in given:
        problems.append("--prompt: either prompts or --input, not both")
    try:
        config = load(rest, "infer")
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if problems:
        raise ConfigError(problems)
    _warn(config)
    if command.nproc is not None and command.nproc > 1:
        return _launch(command)

    from tutti.checkpoint.export import load_trained
    from tutti.infer.run import Job, infer

    source, out = (options[name][0] if options[name] else None for name in ("--input", "--output"))
    infer(config, Job(tuple(options["--prompt"]), source, out), load_trained)
    return 0


def _take_options(argv: list[str], names: tuple[str, ...]) -> tuple[list[str], dict[str, list[str]]]:
    """The command line without the options of these names, and the values of each."""
    rest: list[str] = []
    values: dict[str, list[str]] = {name: [] for name in names}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in values:
            rest.append(token)
            continue
        following = value if equals else next(tokens, None)
        if following is None:
            raise ConfigError([f"{name}: needs a value"])
        values[name].append(following)
    return rest, values


def _init(command: _Command) -> int:
    if len(command.argv) != 1 or command.argv[0].startswith("-"):
        raise ConfigError([f"init: takes the name of a new folder, got {' '.join(command.argv) or 'none'}"])

    from tutti.project import make_project

    (folder,) = command.argv
    for file in make_project(Path(folder)):
        print(f"  {folder.rstrip('/')}/{file}")
    print(f"\nnext: cd {folder} && tutti train config.yaml")
    return 0


def _migrate(command: _Command) -> int:
    argv, options = _take_options(command.argv, ("-o",))
    if len(argv) != 1 or argv[0].startswith("-") or len(options["-o"]) > 1:
        raise ConfigError([f"migrate: takes FILE.yaml [-o OUT.yaml], got {' '.join(command.argv) or 'neither'}"])

    from tutti.migrate import migrate
    from tutti.migrate.show import account, as_yaml

    (path,), out = argv, options["-o"]
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


_VERBS: dict[str, tuple[Callable[[_Command], int], str]] = {
    "train": (_train, _TRAIN_HELP),
    "check": (_check, _CHECK_HELP),
    "export": (_export, _EXPORT_HELP),
    "init": (_init, _INIT_HELP),
    "migrate": (_migrate, _MIGRATE_HELP),
    "args": (_args, _ARGS_HELP),
    "infer": (_infer, _INFER_HELP),
}


def _refuse_nproc_in_rank(command: _Command) -> None:
    if command.nproc is not None and "RANK" in os.environ:
        raise ConfigError(["--nproc: this process is a rank already (RANK is set); use torchrun or --nproc, not both"])


def _launch(command: _Command) -> int:
    """Run the command as its number of ranks on this machine; the exit status."""
    assert command.nproc is not None
    debug = ["--debug"] if command.debug else []
    return launch([sys.executable, "-m", "tutti", command.verb, *command.argv, *debug], command.nproc)


def _world() -> int:
    """The number of ranks that torchrun (or the launcher) started, else 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _configure(command: _Command, world: int) -> Config:
    """The configuration for `world` ranks, its warnings shown by the one process that speaks for all."""
    from tutti.config.layout import resolve_sizes
    from tutti.config.load import load

    config = resolve_sizes(load(command.argv, command.verb), world)
    _warn(config)
    return config


def _warn(config: Config) -> None:
    """Say which settings have no effect."""
    from tutti.config.rules import warnings

    if _speaks():
        for warning in warnings(config):
            print(f"tutti: warning: {warning}", file=sys.stderr)


def _speaks() -> bool:
    """Whether this process tells the user what every rank finds out by itself: rank 0, or else the launcher."""
    return os.environ.get("RANK", "0") == "0" and ERROR_FILE not in os.environ


def _report(error: Exception, *, debug: bool) -> None:
    """Say what went wrong: one line for each problem; with a traceback if asked for, or if the mistake is ours."""
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
    if ERROR_FILE in os.environ:
        Path(os.environ[ERROR_FILE]).write_text(text, encoding="utf-8")
    elif _speaks() or not isinstance(error, ConfigError):
        sys.stderr.write(text)
