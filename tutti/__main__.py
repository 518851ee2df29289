"""The command `tutti` as a process, also as `python -m tutti` for torchrun."""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
from contextlib import suppress

from tutti.core.heap import restart_without_cache


def run() -> None:
    """Run this process's command line and end the process with its exit status.

    Where torch was loaded the process ends without taking the interpreter apart: a thread of torch that still holds
    Python objects at that moment (of gloo, say) can abort it, and a finished run would count as failed.
    """
    faulthandler.enable()
    if next((word for word in sys.argv[1:] if not word.startswith("-")), None) == "train":
        restart_without_cache()

    from tutti.cli import main

    status = main()
    if "torch" in sys.modules:
        # As the interpreter does at its end: first threads that are no daemons, then what was registered.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    raise SystemExit(status)


if __name__ == "__main__":
    run()
