"""Memory of this machine: how much there is, and how what was freed goes back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_KEPT = 128 << 20  # bytes that the C library keeps free
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as mallopt names them


def memory_of_machine() -> int:
    """The bytes that this machine has, or that this container may use. What is free at the moment would change from one
    run of a command to the next."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no bound, or another system
        memory = min(memory, int(_CONTAINER.read_text()))
    return memory


def keep_some() -> None:
    """Lets the C library (glibc) keep some of what is freed, large blocks too, for the rest of the process: else each
    training step fetches most of its memory from the system anew, page by page (docs/decisions.md). Who has set the C
    library up by the environment is left alone."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_MAX, 0)  # no block is the system's own, which would go back to it when it is freed
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def give_back() -> None:
    """Gives freed memory back to the system where the C library keeps it (glibc), so that stages do not add up."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, TypeError, OSError):  # another C library
        return
