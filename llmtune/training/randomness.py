"""Random state that training depends on: taken, put back, held still, and derived from keys."""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from llmtune.types import Rows


def derive_seed(*key: int | str) -> int:
    """Return a 63-bit seed that is a pure function of `key`: the same on every machine, unrelated for other keys."""
    digest = hashlib.sha256("/".join(str(part) for part in key).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_everything(*key: int | str) -> None:
    """Seed Python's, NumPy's and torch's (every device's) random state, each from a seed derived from `key`."""
    seed_cpu(*key)
    if torch.accelerator.is_available():
        torch.manual_seed(derive_seed(*key, "torch"))


def seed_cpu(*key: int | str) -> None:
    """Seed Python's, NumPy's and torch's random state on the CPU, each from a seed derived from `key`."""
    random.seed(derive_seed(*key, "python"))
    np.random.seed(derive_seed(*key, "numpy") % 2**32)
    torch.default_generator.manual_seed(derive_seed(*key, "torch"))


@contextmanager
def keyed_randomness(*key: int | str) -> Iterator[None]:
    """Run the block from a random state that is a pure function of `key`, and put back that of before.

    What the block draws from Python, NumPy or torch on the CPU depends on the key alone: not on what ran before, in
    which process or worker it runs, or whether the run was resumed.
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu(*key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def fetch_rows(data: Rows, indices: Sequence[int], *, seed: int, first: int) -> list[Any]:
    """Return `data[index]` for each index, every row fetched under randomness of its own, keyed by (seed, sample).

    So a data set that augments its rows draws the same for a sample however the step is cut and whoever fetches it.

    Args:
        data: rows by number. A list or tuple holds its rows already, and draws nothing.
        indices: which rows.
        seed: of the run.
        first: the number of the first row in the endless chain of samples; the others follow.
    """
    if type(data) in (list, tuple):  # a class made of one may draw
        return [data[index] for index in indices]
    with keyed_randomness(seed, "rows"):
        rows = []
        for sample, index in enumerate(indices, first):
            seed_cpu(seed, "sample", sample)
            rows.append(data[index])
    return rows


@functools.lru_cache(maxsize=2)
def permutation(length: int, seed: int, epoch: int) -> list[int]:
    """Return the order of `length` rows in `epoch`: a pure function of (length, seed, epoch)."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(length, generator=generator).tolist()


def rows_of_step(step: int, *, length: int, size: int, seed: int, epochs: int | None = None) -> list[int]:
    """Return which rows make up a step: the next `size` of an endless chain of epochs, each shuffled anew.

    Args:
        step: the step, from 0.
        length: rows of the data set.
        size: rows of a step.
        seed: of the order.
        epochs: where the chain ends; the last step is then shorter, and every row is seen exactly `epochs` times.
    """
    end = (step + 1) * size if epochs is None else min((step + 1) * size, epochs * length)
    places = (divmod(position, length) for position in range(step * size, end))
    return [permutation(length, seed, epoch)[offset] for epoch, offset in places]


def random_state() -> dict[str, Any]:
    """Return the random state of Python, NumPy and torch as tensors and JSON values."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_rest": [int(numpy_state["state"]["pos"]), int(numpy_state["has_gauss"]), float(numpy_state["gauss"])],
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [version, gauss],
    }
    if torch.cuda.is_initialized():
        state |= {f"cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` took."""
    torch.set_rng_state(state["torch"].cpu())
    position, has_gauss, gauss = state["numpy_rest"]
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, python_gauss = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), python_gauss))
    devices = sorted(int(name.removeprefix("cuda.")) for name in state if name.startswith("cuda."))
    for index in devices[: torch.cuda.device_count()]:
        torch.cuda.set_rng_state(state[f"cuda.{index}"].cpu(), index)


@contextmanager
def fixed_randomness(state: Mapping[str, Any] | None = None) -> Iterator[Mapping[str, Any]]:
    """Run the block from a given random state and put the state of before it back afterwards.

    Two blocks started from the same state draw the same dropout masks, which is what two forward passes of one
    sharpness-aware step need:

        with fixed_randomness() as state:
            first = model(**batch)
        with fixed_randomness(state):
            second = model(**batch)  # the same masks

    Args:
        state: what `random_state` or an earlier `fixed_randomness` gave; left out, the present state.
    """
    before = random_state()
    start = before if state is None else state
    set_random_state(start)
    try:
        yield start
    finally:
        set_random_state(before)
