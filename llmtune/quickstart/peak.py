"""The largest memory of this process while one piece of work runs."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

from llmtune.training.memory import peak_memory

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def start_peak() -> bool:
    """Give freed memory back to the system and set the process's high-water mark to what it holds now.

    Returns:
        Whether the mark could be set: on Linux it can. Elsewhere it is the largest since the process began.
    """
    gc.collect()
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed, and the next way's peak would contain it
        except (OSError, AttributeError):
            pass
        try:
            CLEAR.write_text("5")
        except OSError:
            return False
        return True
    return False


def read_peak() -> int:
    """Return the high-water mark of the process's resident memory, in bytes."""
    if sys.platform == "linux":
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory()
