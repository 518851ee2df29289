"""The C library's heap, where a CPU's tensors lie: fewer holes between them.

glibc keeps small chunks of memory that were freed in a cache of each thread, and hands them out again from there. A
tensor begins at a multiple of 64 bytes, and the few bytes before it, which that leaves over, go to this cache and from
there to small objects that live longer than the tensor. Once it is freed, its memory can't grow together with what lies
before it, and is a little too short for the next tensor of its size, which needs as many bytes to spare. Without the
cache most of these bytes become part of their neighbours again. A step whose tensors take 1.1 GiB had holes of 246 MiB
before and of 151 after, in equal time; tokenising takes a tenth more.

The cache is set up when a process starts, by an environment variable. So the process starts anew, before it has
imported anything large.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_CACHE = "glibc.malloc.tcache_count"
_ACCELERATORS = ("nvidiactl", "kfd", "davinci_manager")
"""Files in /dev where there is an accelerator, on which tensors lie in memory of its own."""


def restart_without_cache() -> None:
    """Make glibc do without a cache of small chunks in this process, which starts anew for it: this call returns only
    where there is nothing to do (another C library or an accelerator, or the user has set the cache), and where the
    process's words are not those that it was started with."""
    before, words = os.environ.get(_TUNABLES, ""), sys.argv[1:]
    if _CACHE in before or not _is_glibc() or any(Path("/dev", name).exists() for name in _ACCELERATORS):
        return
    if sys.orig_argv[len(sys.orig_argv) - len(words) :] != words:
        return
    tunables = ":".join(filter(None, [before, f"{_CACHE}=0"]))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_TUNABLES: tunables})


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:  # a name that other libraries do not know
        return False
