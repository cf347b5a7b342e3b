"""A step that finds no memory is taken again in smaller micro-batches: the same rows, the same gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmtune.training.memory import free_cached_memory, is_out_of_memory
from llmtune.training.randomness import keyed_randomness, seed_everything
from llmtune.types import Batch

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop


def within_memory(loop: TrainingLoop, batches: Sequence[Batch]) -> dict[str, Any]:
    """Return `loop.accumulate_gradients(batches)`; where memory runs out, halve the micro-batch and do it again.

    No weight has changed by then, the batches are made anew of the same rows, and the step's random state starts again.
    The smaller size stays for the rest of the run. Of several processes all halve together. An `accumulate_gradients`
    of your own that moves weights must put them back in a `finally`.

    Raises:
        RuntimeError: what ran out of memory, where a micro-batch is one row already or does not become smaller.
    """
    while True:
        try:
            return loop.accumulate_gradients(batches)
        except (RuntimeError, MemoryError) as error:
            batches = _halved(loop, batches, error)
        loop.model.zero_grad(set_to_none=True)
        free_cached_memory()


def _halved(loop: TrainingLoop, batches: Sequence[Batch], error: BaseException) -> list[Batch]:
    before = size = loop.rows_per_micro_batch
    if not is_out_of_memory(error) or (loop.ranks.sharded and loop.ranks.world > 1):
        raise error
    seed, step = loop.settings.seed, loop.step
    smaller: list[Batch] = []
    while len(smaller) <= len(batches):  # a short step, or few rows, may take several halvings
        if size == 1:
            loop.rows_per_micro_batch = before
            raise error
        loop.rows_per_micro_batch = size = -(-size // 2)
        with keyed_randomness(seed, "batches", step):
            smaller = loop.micro_batches(step)
    if loop.ranks.main:
        print(
            f"step {step + 1}: out of memory; micro-batches of {size} rows instead of {before} from here on, for the "
            "same gradient"
        )
    seed_everything(seed, "step", step)
    return smaller
