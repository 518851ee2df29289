"""The C library's heap, which holds a CPU's tensors: reducing its fragmentation.

glibc caches small freed chunks per thread and reuses them. A tensor starts at a multiple of 64 bytes; the few bytes
before it that alignment leaves over go to this cache, and from there to small objects that live longer than the tensor.
When the tensor is freed, its memory cannot be merged with what lies before it, and is slightly too small for the next
tensor of the same size. Without the cache most of these bytes are merged with their neighbors again. For a step whose
tensors take 1.1 GiB this reduced the unused gaps from 246 MiB to 151, at equal speed; tokenizing takes a tenth longer.

The cache is configured by an environment variable when a process starts. So the process restarts itself before it has
imported anything large.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TUNABLES = "GLIBC_TUNABLES"
_CACHE = "glibc.malloc.tcache_count"
_ACCELERATORS = ("nvidiactl", "kfd", "davinci_manager")
"""Files in /dev that indicate an accelerator, whose tensors have memory of their own."""


def restart_without_cache() -> None:
    """Restart this process with glibc's small-chunk cache disabled. Returns only if there is nothing to do (another
    C library, an accelerator, or the user has configured the cache), or if sys.argv is not what the process was
    started with."""
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
    except ValueError:  # other libraries do not know this name
        return False
