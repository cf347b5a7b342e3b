"""The regularizers in several processes: the gradient, weights and history of one, or a sentence."""

import pytest
import torch
from ranks_cases import gone_through, with_lora
from ranks_worker import run
from test_ranks import same

from llmtune.losses.confidence import ConfidencePenaltyLoss
from llmtune.regularizers.child_tuning import ChildTuning
from llmtune.regularizers.decoupled_l2sp import DecoupledL2SP
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.regularizers.flooding import Flooding
from llmtune.regularizers.freelb import FreeLBLoss
from llmtune.regularizers.l2sp import L2SP
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import shard
from llmtune.training.sharpness import SharpnessAware

LEVEL = 4.5  # between the losses of the run


def importances(model):
    draw = torch.Generator().manual_seed(3)
    return {name: torch.rand(p.shape, generator=draw) for name, p in model.named_parameters() if "q_proj" in name}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


CASES = {  # what each adds to a loop over the model
    "L2SP": lambda model: {"penalties": [L2SP(model, 5.0)]},
    "L2SP, LoRA": lambda model: {"penalties": [L2SP(with_lora(model), 5.0)]},
    "DeltaNorm": lambda model: with_lora(model) and {"penalties": [DeltaNorm(5.0)]},
    "DecoupledL2SP": lambda model: {"callbacks": [DecoupledL2SP(weights_of(model), 5.0)]},
    "ChildTuning": lambda model: {"callbacks": [ChildTuning(0.3, fisher=importances(model))]},
    "Flooding": lambda model: {"callbacks": [Flooding(LEVEL)]},
    "Flooding, SAM": lambda model: {"callbacks": [Flooding(LEVEL)]},
    "FreeLB": lambda model: {"loss": FreeLBLoss(epsilon=0.5, step_size=0.25, steps=2, start=0.0)},
    "confidence penalty": lambda model: {"loss": ConfidencePenaltyLoss(strength=0.3)},
}


def make(name, *, sharded=False):
    model = tiny_llama()
    more = CASES[name](model)
    if sharded:
        shard(model)
    settings = LoopSettings(
        max_steps=5, rows_per_step=8, rows_per_micro_batch=2, learning_rate=3e-2, progress=False, schedule="constant"
    )
    return (SharpnessAware if "SAM" in name else TrainingLoop)(model, uneven_rows(13), settings=settings, **more)


def measured_all(rank, names):
    return {name: gone_through(make(name)) for name in names}


def test_two_processes_are_one(tmp_path):
    found = run(2, measured_all, list(CASES), folder=tmp_path)
    for name in CASES:
        wanted = gone_through(make(name))
        same([result[name] for result in found], wanted)
        if "Flooding" in name:
            assert {row["flooded"] for row in wanted[2]} == {0, 1}


def refusals(rank, names):
    told = {}
    for name in names:
        with pytest.raises(ValueError, match="spread over processes") as error:
            make(name, sharded=True).fit()
        told[name] = str(error.value)
    return told


def test_what_needs_whole_parameters_says_so(tmp_path):
    told, other = run(2, refusals, ["DecoupledL2SP", "ChildTuning"], folder=tmp_path)
    assert told == other
    assert "make the anchor of the model as it is trained, after it has been spread" in told["DecoupledL2SP"]
    assert told["ChildTuning"].endswith("train data-parallel, without sharding")
