"""Worker processes: forked, and ignoring signals that are meant for the trainer.

Forking takes milliseconds, while starting a new interpreter takes seconds. It is safe here because a worker only runs
numpy, the tokenizer and small tensor copies on one thread, and never uses the accelerator.

At SIGINT or SIGTERM the trainer finishes its step and saves. Such signals are often sent to every process of a run, and
a worker that died would break the step. So workers ignore SIGINT, and obey SIGTERM only from their parent.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

NICE = 10
"""The niceness of workers relative to the trainer. Otherwise, when both need a core, the threads of a step would
wait for the one whose core a worker occupies; a worker gets a core when the step does not use it, or waits for data.
"""

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@contextlib.contextmanager
def quiet_fork() -> Iterator[None]:
    """Within this context processes may be forked: tokenizers neither warn nor use threads.

    Signals are blocked meanwhile, in the children until `be_a_worker`, since an earlier one would still kill them.
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
    gc.freeze()  # what the trainer has left to the collector, loaders with queues among it, is not a worker's to end
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _obey(parent: int) -> None:
    """End this process when `parent` says so, or has ended."""
    while os.getppid() == parent:
        heard = signal.sigtimedwait({signal.SIGTERM}, 5.0)
        if heard is not None and heard.si_pid == parent:
            break
    os._exit(0)
