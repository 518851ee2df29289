"""Chatting with a model: one turn per line, commands, a history that fits the context, and Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.infer.models import ONE, open_model, write_model
from tutti.infer.chat import chat
from tutti.infer.generate import Generator
from tutti.infer.sampling import Sampler


class Talk:
    """A chat on given lines; `asked` are the prompts that the model was given."""

    def __init__(self, path: str, monkeypatch, capsys, **infer):
        self._config, self._loaded = open_model(path, **{"do_sample": False, "max_tokens": 6} | infer)
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.asked: list[str] = []
        self.requests = []

    def __call__(self, *lines: str, press_after: int | None = None) -> str:
        self.asked, self.requests = [], []
        stream = Generator.stream

        def watched(generator, requests):
            self.requests += requests
            self.asked += [self._loaded.form.tokenizer.decode(request.ids) for request in requests]
            for made, token in enumerate(stream(generator, requests), start=1):
                if made == press_after:
                    os.kill(os.getpid(), signal.SIGINT)
                yield token

        self._monkeypatch.setattr(Generator, "stream", watched)
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        self._capsys.readouterr()
        sampler = Sampler.of(self._config.infer)
        chat(self._config, self._loaded, Generator(self._loaded.logits, sampler, self._loaded.stop_ids, ONE, 10_000))
        self._monkeypatch.setattr(Generator, "stream", stream)
        return self._capsys.readouterr().out


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def talk(model, monkeypatch, capsys):
    return Talk(model, monkeypatch, capsys)


def user(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n"


PROMPT = "<|im_start|>assistant\n"


def test_the_history_is_given_with_each_turn(talk):
    answers = talk("Hello", "And now?").splitlines()
    assert len(answers) == 2
    first, second = talk.asked
    assert first == user("Hello") + PROMPT
    assert second == f"{user('Hello')}{PROMPT}{answers[0]}<|im_end|>\n{user('And now?')}{PROMPT}"


@pytest.mark.parametrize("template", ["plain", "llama2"])
def test_an_answer_is_fed_back_as_it_was_made(model, monkeypatch, capsys, template):
    """The model also generates the blanks that the template writes around an answer, but they are written once."""
    talk = Talk(model, monkeypatch, capsys, chat_template=template)
    tokenizer = talk._loaded.form.tokenizer
    words = iter([*tokenizer(" A cat ").input_ids, *tokenizer("abcdefghijkl" * 3).input_ids])
    monkeypatch.setattr(Sampler, "pick", lambda self, logits, generators: torch.tensor([next(words)]))
    shown = talk("Hello", "And now?").splitlines()
    assert shown[0].startswith("A cat")
    first, second = talk.asked
    assert second.startswith(f"{first} {shown[0]}")


def test_commands(talk):
    shown = talk(
        "Hello", "/reset", "Again", "/system Be brief", "Hm", "/system", "//slash", "/what", "", "/exit", "never"
    )
    assert talk.asked == [
        user("Hello") + PROMPT,
        user("Again") + PROMPT,
        f"<|im_start|>system\nBe brief<|im_end|>\n{user('Hm')}{PROMPT}",
        user("/slash") + PROMPT,
    ]
    assert "there is no command /what" in shown and "(the conversation is forgotten)" in shown
    assert "/reset" in talk("/help") and not talk.asked


def test_lines_that_go_on(talk):
    talk("one\\", "two\\", "three", "four\\")
    assert talk.asked[0] == user("one\ntwo\nthree") + PROMPT
    assert talk.asked[1].endswith(user("four") + PROMPT)


def test_the_oldest_turns_go_when_the_context_is_full(talk):
    long = "word " * 60
    shown = talk("/system Be brief", *[f"{number} {long}" for number in range(4)], "x " * 300, "short")
    assert "(the conversation outgrew the context of 256 tokens: its oldest turn is left out)" in shown
    assert all(len(request.ids) + 6 <= 256 for request in talk.requests)
    assert all("Be brief" in asked for asked in talk.asked)
    assert "0 word" not in talk.asked[3] and "3 word" in talk.asked[3]
    assert "(not sent: the prompt has" in shown, "a message that can't fit"
    assert len(talk.asked) == 5 and "short" in talk.asked[4], "and the talk goes on"
    assert "3 word" in talk.asked[4], "with all that was said before"


def test_ctrl_c_stops_the_answer_and_not_the_program(talk, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    whole = talk("Hello").rstrip("\n")
    lines = talk("Hello", "Next", press_after=3).splitlines()
    assert len(lines) == 2, "the next turn was answered"
    assert whole.startswith(lines[0]) and len(lines[0]) < len(whole)
    assert f"{PROMPT}{lines[0]}<|im_end|>" in talk.asked[1]
    assert signal.getsignal(signal.SIGINT) is before


def test_turns_of_a_talk_are_sampled_anew_and_the_talk_again_alike(model, monkeypatch, capsys):
    talk = Talk(model, monkeypatch, capsys, do_sample=True)
    shown = talk("Hello", "/reset", "Hello")
    answers = [line for line in shown.splitlines() if not line.startswith("(")]
    assert answers[0] != answers[1] and talk("Hello", "/reset", "Hello") == shown


def test_a_model_without_template_can_not_talk(model, monkeypatch, capsys):
    talk = Talk(model, monkeypatch, capsys)
    talk._loaded = replace(talk._loaded, form=replace(talk._loaded.form, template=None))
    with pytest.raises(ValueError, match=r"infer\.chat_template: the model has no chat template"):
        talk("Hello")


@pytest.mark.parametrize(("ranks", "at_start"), [(1, signal.SIG_IGN), (2, signal.SIG_DFL)], ids=["ignored", "ranks"])
def test_in_a_terminal(model, ranks, at_start, tmp_path):
    """Marks for input, answers, Ctrl-C at the mark (also where SIGINT is ignored at the start), Ctrl-D to leave."""
    master, slave = pty.openpty()
    arguments = [f"--infer.model_path={model}", "--infer.max_tokens=20", f"--nproc={ranks}"]
    command = [sys.executable, "-m", "tutti", "infer", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    errors = tmp_path / "stderr"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, at_start),
        )
    os.close(slave)
    screen = _Screen(master)
    try:
        screen.until("> ")
        _press_ctrl_c(process, screen)
        os.write(master, b"Hello\n")
        screen.until("> ")
        _press_ctrl_c(process, screen)
        os.write(master, b"/system Be brief\n")
        screen.until("new conversation")
        screen.until("> ")
        os.write(master, b"\x04")
        assert process.wait(30) == 0, errors.read_text()
    finally:
        process.kill()
        os.close(master)


def _press_ctrl_c(process: subprocess.Popen, screen: _Screen) -> None:
    """Press until there is a reaction: if the prompt is shown but reading has not begun, Ctrl-C waits for the next
    key."""
    for _ in range(20):
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        if screen.shows("leaves)", 3):
            return
    raise AssertionError("Ctrl-C is not heard")


class _Screen:
    """The output of a program in a terminal, read up to one expected text after the other."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._unread = ""

    def until(self, text: str) -> None:
        assert self.shows(text, 60), f"no {text!r} in {self._unread!r}"

    def shows(self, text: str, seconds: float) -> bool:
        """Read until `text` has arrived, and leave what follows unread; True if it arrived."""
        deadline = time.monotonic() + seconds
        while text not in self._unread:
            if not select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self._unread += os.read(self._master, 4096).decode(errors="replace")
        self._unread = self._unread.partition(text)[2]
        return True
