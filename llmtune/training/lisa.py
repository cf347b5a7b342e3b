"""LISA: a few layers, drawn at random, train at a time."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch

from llmtune.modules import unwrap
from llmtune.optim.depth import is_layer, steps_below_top
from llmtune.training.part_trains import PartTrains, check_whole
from llmtune.training.randomness import derive_seed


class LISA(PartTrains):
    """Train embeddings, head and last norm in every step, and of the layers a few, drawn anew every so many steps.

    Which layers train in a step is a pure function of (the run's seed, step // every), so a resumed run draws the same.
    Layers are found by the numbers in parameters' names, an encoder's and a decoder's together; what was frozen before
    the run stays so, and a layer without anything that is trained is not drawn.

    Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning" (2024),
    algorithm 1, where every layer is as probable. A layer that goes to sleep loses its optimizer state, which is where
    memory is saved, and starts anew when it wakes. LMFlow's callback keeps the moments of every layer that was ever
    awake; it draws from NumPy's global state, and only at steps that `every` divides, so that a run resumed between two
    of them trains all layers until the next.

    Args:
        layers: how many layers train at a time, at least 1.
        every: optimizer steps between two draws, at least 1.
        keep_state: whether layers that sleep keep their optimizer state.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, layers: int = 2, *, every: int = 20, keep_state: bool = False) -> None:
        super().__init__()
        check_whole("layers", layers)
        check_whole("every", every)
        self.layers, self.every, self.keep_state = layers, every, keep_state

    def on_fit_start(self, loop: Any) -> None:
        """Have the optimizer made.

        Raises:
            ValueError: the model has not more layers than are to train at a time, or none by name.
        """
        super().on_fit_start(loop)
        places = steps_below_top(unwrap(loop.model))
        self._places = {name: places[name][0] for name in self.trained if is_layer(places[name][0])}
        there = len(set(self._places.values()))
        if self.layers >= there:
            raise ValueError(f"LISA trains {self.layers} layers at a time and {there} are trained in all: leave it out")

    def drawn(self, loop: Any) -> list[str]:
        """Return the names of the layers that train in step `loop.step`, in the model's order."""
        every = list(dict.fromkeys(self._places.values()))
        seed = derive_seed(loop.settings.seed, "LISA", loop.step // self.every)
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
        return [every[place] for place in sorted(order[: self.layers])]

    def awake(self, loop: Any) -> Set[str]:
        """Return what lies in the layers drawn, and what lies in none."""
        drawn = self.drawn(loop)
        return {name for name in self.trained if self._places.get(name, drawn[0]) in drawn}

    def on_step_start(self, loop: Any) -> None:
        """Send to sleep all layers but those drawn, and drop their optimizer state."""
        super().on_step_start(loop)
        for parameter in () if self.keep_state else self._asleep:
            loop.optimizer.state.pop(parameter, None)
