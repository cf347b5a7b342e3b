"""What the tests of the loop share: small settings, weights to compare, a stop, a stream."""

import torch

from llmtune.testing.loop import uneven_rows
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def settings(**changed):
    return LoopSettings(**({"max_steps": 3, "rows_per_step": 4, "progress": False, "learning_rate": 1e-3} | changed))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


class Stop(Callback):
    """Ends a run after `step` + 1 steps, as Ctrl-C does."""

    def __init__(self, step):
        self.at = step

    def on_step_end(self, loop, metrics):
        if loop.step == self.at + 1:
            raise KeyboardInterrupt


class StreamOf:
    """A stream of rows that knows how many it has given."""

    def __init__(self, rows=None):
        self.rows, self.place = uneven_rows(13) if rows is None else rows, 0

    def __iter__(self):
        while self.place < len(self.rows):
            self.place += 1
            yield self.rows[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]
