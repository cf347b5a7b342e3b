"""Short runs with a penalty, stopped or not, and states through a file; for the tests beside it."""

import json

import pytest
from safetensors.torch import load_file, save_file

from llmtune.data.collate import collate_padded
from llmtune.training.checkpoint_state import join_tensors, split_tensors
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings


def through_a_file(state, folder):
    """Return a state as it comes back from safetensors and JSON."""
    values, tensors = split_tensors(state)
    save_file(tensors, folder / "state.safetensors")
    return join_tensors(json.loads(json.dumps(values)), load_file(folder / "state.safetensors"))


def fitted(model, penalty, rows, loss, folder=None, *, steps=3, stop=None, callbacks=(), **settings):
    """Return a loop that has run: to its end, resumed where there is a folder; or until the power goes at `stop`."""

    class Stop(TrainingLoop):
        def training_step(self, batches):
            if self.step == stop:
                raise RuntimeError("the power goes")
            return super().training_step(batches)

    options = {"max_steps": steps, "rows_per_step": 2, "learning_rate": 0.01, "progress": False, **settings}
    if folder is not None:
        options |= {"folder": folder, "save_every": 1}
    run = LoopSettings(**options)
    loop = Stop(model, rows, settings=run, collate=collate_padded, loss=loss, penalties=[penalty], callbacks=callbacks)
    if stop is None:
        loop.fit(resume=folder is not None)
        return loop
    with pytest.raises(RuntimeError, match="the power goes"):
        loop.fit()
    return loop
