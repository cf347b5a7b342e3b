"""Gradual unfreezing: the top trains first, then one layer more at a time."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from llmtune.modules import unwrap
from llmtune.optim.depth import steps_below_top
from llmtune.training.part_trains import PartTrains, check_whole


class GradualUnfreezing(PartTrains):
    """Train the top alone, then, every so many steps, one layer more from the top down; the embeddings come last.

    In step t train the t // every + 1 topmost of the depths at which anything is trained: the head with a last norm or
    pooler is the first, then come the layers (an encoder's and a decoder's side by side), then the embeddings. A head
    that is tied to the embeddings is at their depth. What wakes gets its optimizer state then.

    Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification" (2018), section 3.3, where `every`
    is one epoch.

    Args:
        every: optimizer steps until the next depth wakes, at least 1.

    Raises:
        ValueError: `every` is out of its range.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        check_whole("every", every)
        self.every = every

    def on_fit_start(self, loop: Any) -> None:
        """Have the optimizer made.

        Raises:
            ValueError: the model has no layers by name; or the run is over before all is awake.
        """
        super().on_fit_start(loop)
        steps = steps_below_top(unwrap(loop.model))
        self._depths = {name: steps[name][1] for name in self.trained}
        needed = self.every * (len(set(self._depths.values())) - 1) + 1
        if needed > loop.total_steps:
            raise ValueError(
                f"every={self.every} wakes the lowest of what is trained in step {needed}, and the run has "
                f"{loop.total_steps} steps: set every lower, or freeze what shall not train (freeze_first_layers)"
            )

    def awake(self, loop: Any) -> Set[str]:
        """Return what lies at the depths that are awake."""
        lowest = sorted(set(self._depths.values()))[: loop.step // self.every + 1][-1]
        return {name for name, depth in self._depths.items() if depth <= lowest}
