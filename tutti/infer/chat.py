"""A conversation with the model, turn by turn, in a terminal or with piped lines, one turn per line.

The whole history is rendered for each answer, and the answer is shown as it is generated. If the context has no room
for the history and an answer, the oldest turns are dropped, with a message. Ctrl-C stops an answer (its beginning stays
in the history), not the program. With several ranks, rank 0 reads and writes.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from tutti.config import Config
from tutti.data.media_places import Entry
from tutti.data.rows import KINDS, Conversation, RowError
from tutti.infer.drawing import PictureCollector
from tutti.infer.generate import Generator, Request
from tutti.infer.load import LoadedModel
from tutti.infer.prompts import PromptFormat, as_part, chat_request, chat_tokens
from tutti.infer.stream import TextStream, answer_text

_HELP = """\
Write a message and press Enter; a line that ends in \\ goes on in the next one. Ctrl-C stops an answer.
  /image PATH     put an image before the next message (also /video, /audio)
  /reset          forget the conversation
  /system TEXT    set the system message, and forget the conversation (without TEXT: none)
  /help           this
  /exit           leave (or Ctrl-D)
"""

_LEAST_ROOM = 256
"""Minimum room for an answer in tokens (or max_tokens, or a quarter of the context, if smaller) before history is
dropped."""


@dataclass
class ChatHistory:
    """The conversation so far. media: parts to put before the next message. answered: number of turns answered since
    the start, which seeds the next one."""

    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    media: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0

    def conversation(self) -> Conversation:
        head = [{"role": "system", "content": self.system}] if self.system else []
        messages = head + self.messages
        return Conversation(messages, (False,) * len(messages))


def chat(config: Config, loaded: LoadedModel, generator: Generator, media: Sequence[Entry] = ()) -> None:
    """Chat until /exit or the end of the input, with `media` before the first message. Collective. ValueError: the
    model has no chat template."""
    world = generator.world
    if loaded.form.template is None:
        raise ValueError("infer.chat_template: the model has no chat template to talk by; name one (chatml, say)")
    show: Callable[[str], None] = _show if world.is_main else lambda text: None
    if not world.is_main:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 handles Ctrl-C
    terminal = world.broadcast(sys.stdin.isatty())
    if terminal:
        show("Talk to the model; /help lists commands.\n")
    if terminal and world.is_main:
        # Python keeps SIGINT ignored if it was ignored at the start, as for background jobs of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    history = ChatHistory(media=[as_part(*entry) for entry in media])
    while True:
        line = world.broadcast(_read_turn(terminal) if world.is_main else None)
        if line is None:
            return
        if line.startswith("/") and not line.startswith("//"):
            if not _command(line, loaded.form, history, show):
                return
        elif line.strip():
            _answer(config, loaded, generator, history, line.removeprefix("/") if line[:2] == "//" else line, show)


def _read_turn(terminal: bool) -> str | None:
    """Read the next message or command; None at the end of the input."""
    lines: list[str] = []
    while True:
        try:
            line = _read_line("... " if lines else "> ", terminal)
        except KeyboardInterrupt:
            if not terminal:
                raise
            _show("\n(/exit or Ctrl-D leaves)\n")
            lines.clear()
            continue
        if line is None:
            return "\n".join(lines) if lines else None
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        return "\n".join([*lines, line])


def _read_line(mark: str, terminal: bool) -> str | None:
    if not terminal:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    with suppress(ImportError):
        import readline  # noqa: F401  # gives input() editing and a history
    try:
        return input(mark)
    except EOFError:
        _show("\n")
        return None


def _command(line: str, form: PromptFormat, history: ChatHistory, show: Callable[[str], None]) -> bool:
    """Run a command line that begins with /; returns False if it ends the chat."""
    name, _, text = line.partition(" ")
    if name in ("/exit", "/quit"):
        return False
    if name.removeprefix("/") in KINDS:
        _attach(name.removeprefix("/"), text.strip(), form, history, show)
    elif name == "/reset":
        history.messages.clear()
        history.media.clear()
        show("(the conversation is forgotten)\n")
    elif name == "/system":
        history.messages.clear()
        history.system = text.strip() or None
        show("(a new conversation with this system message)\n" if history.system else "(no system message)\n")
    elif name == "/help":
        show(_HELP)
    else:
        show(f"(there is no command {name}; /help lists them; a message that begins with / is written //)\n")
    return True


def _attach(kind: str, text: str, form: PromptFormat, history: ChatHistory, show: Callable[[str], None]) -> None:
    """Put the file that `text` names before the next message, if the model accepts it."""
    path = _file_named(text)
    if path is None:
        show(f"(there is no file {text})\n" if text else f"(/{kind} takes the path of a file)\n")
        return
    media = [*history.media, as_part(kind, str(path))]
    try:
        ids, _ = chat_tokens(form, Conversation([{"role": "user", "content": media}], (False,)))
        if form.context is not None and len(ids) >= form.context:
            raise RowError(f"with it a message has {len(ids):,} tokens, and the model's context {form.context:,}")
    except RowError as error:
        show(f"(not taken: {error})\n")
        return
    history.media = media
    show(f"({path.name} comes before the next message)\n")


def _file_named(text: str) -> Path | None:
    """The file with this name, or with the name as a shell would read it: terminals quote dropped files."""
    names = [text]
    with suppress(ValueError):
        names += shlex.split(text)
    return next((path for name in names[:2] if (path := Path(name).expanduser()).is_file()), None)


def _answer(
    config: Config,
    loaded: LoadedModel,
    generator: Generator,
    history: ChatHistory,
    message: str,
    show: Callable[[str], None],
) -> None:
    """Answer `message` until done or Ctrl-C, and add both to the history."""
    content = [*history.media, {"type": "text", "text": message}] if history.media else message
    messages = [*history.messages, {"role": "user", "content": content}]
    try:
        asked, dropped = _fitting(config, loaded, replace(history, messages=messages))
    except RowError as error:
        show(f"(not sent: {error})\n")
        return
    if dropped:
        left_out = f"its oldest {_turns(dropped)} left out"
        show(f"(the conversation outgrew the context of {loaded.form.context} tokens: {left_out})\n")
    history.messages, history.media = messages[2 * dropped :], []
    stream = TextStream(loaded.form.tokenizer, asked.edges)
    ids: list[int] = []

    def keep(number: int, place: int, picture: Image.Image) -> None:
        file = Path(f"picture_{history.answered + 1}_{place}.png")
        if generator.world.is_main:
            picture.save(file)
        show(f"[{file}]")

    with _interruptible(generator) if generator.world.is_main else nullcontext():
        for token in PictureCollector(generator.drawing, keep).watch(generator.stream([asked])):
            if token.end != "stop":
                ids.append(token.id)
                show(stream.add(token.id))
    show(stream.end() + "\n")
    answer = answer_text(loaded.form.tokenizer, ids, asked.edges)
    history.messages.append({"role": "assistant", "content": answer})
    history.answered += 1


def _fitting(config: Config, loaded: LoadedModel, history: ChatHistory) -> tuple[Request, int]:
    """Make a request from the history, without as many of the oldest turns as do not fit into the context; returns it
    and the number of dropped turns.

    RowError: the last message alone leaves no room for an answer.
    """
    form, most = loaded.form, config.infer.max_tokens
    turns = (len(history.messages) - 1) // 2
    for dropped in range(turns + 1):
        conversation = replace(history, messages=history.messages[2 * dropped :]).conversation()
        if form.context is not None and dropped < turns:
            room = min(most, _LEAST_ROOM, max(1, form.context // 4))
            if len(chat_tokens(form, conversation)[0]) + room > form.context:
                continue
        break
    return chat_request(form, conversation, history.answered, most), dropped


def _turns(count: int) -> str:
    return "turn is" if count == 1 else f"{count} turns are"


@contextmanager
def _interruptible(generator: Generator) -> Iterator[None]:
    """Make Ctrl-C end the current stream instead of the program."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    generator.interrupted = lambda: pressed
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        generator.interrupted = lambda: False


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
