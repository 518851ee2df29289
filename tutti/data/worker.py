"""Worker processes: forked, quiet, and deaf to signals that are meant for the trainer.

Forking takes milliseconds where starting an interpreter anew takes seconds. It is safe here because a worker runs only
numpy, the tokenizer and small tensor copies on one thread, and never touches the accelerator.

At SIGINT or SIGTERM the trainer finishes its step and saves. Such signals often go to every process of a run, and a
worker that died of one would take the step with it. So workers ignore SIGINT, and heed SIGTERM only from their parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

NICE = 10
"""Steps by which the priority of workers is below the trainer's. Where both need a core, the threads of a step would
wait for the one whose core a worker has; a worker finds a core when the step has no use for it, or waits for data."""

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def quiet_fork() -> Iterator[None]:
    """Within it processes may be forked: tokenizers, told to, neither warn nor use threads there.

    Signals wait meanwhile, in the children until `be_a_worker`: one that came before it would still end them.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*worker processes in total")
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def be_a_worker(*_: Any) -> None:
    """Prepare a worker process."""
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _obey(parent: int) -> None:
    """End this process when `parent` says so, or is no more."""
    while os.getppid() == parent:
        heard = signal.sigtimedwait({signal.SIGTERM}, 5.0)
        if heard is not None and heard.si_pid == parent:
            break
    os._exit(0)
