"""How much memory this process has taken at most."""

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
