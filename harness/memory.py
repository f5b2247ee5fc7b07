"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt, in glibc's malloc.h


def keep() -> bool:
    """Keep what was freed for the next use; whether this system can be told so.

    glibc gives every large block back as soon as it is freed, and a training step asks for the same
    dozen anew: each page is then faulted in and zeroed once a step, a fifth of the step's time and
    more. The largest memory of the process is not changed by this.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, 2**31 - 1))
