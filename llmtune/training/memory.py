"""How much memory was taken at most, and whether there was none left."""

from __future__ import annotations

import sys

import torch


def peak_memory() -> int:
    """Return the largest memory held so far, in bytes: of the accelerator where one is in use, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows keeps no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device, or this process, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


def free_cached_memory() -> None:
    """Give back what torch's allocator holds and nobody uses."""
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()
