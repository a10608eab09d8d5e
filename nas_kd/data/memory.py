"""Memory of this machine: how much there is, and how what was freed goes back."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def memory_of_machine() -> int:
    """The bytes that this machine has, or that this container may use. What is free at the moment would change from one
    run of a command to the next."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no bound, or another system
        memory = min(memory, int(_CONTAINER.read_text()))
    return memory


def give_back() -> None:
    """Gives freed memory back to the system where the C library keeps it (glibc), so that stages do not add up."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, TypeError, OSError):  # another C library
        return
