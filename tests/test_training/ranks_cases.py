"""Runs that must give the same gradient and the same weights in one process and in several."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from llmtune.adapters import LoRA, attach
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.agreement import whole
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import shard
from llmtune.training.sharpness import SharpnessAware


class Twice(TrainingLoop):
    """Calls the model twice on each batch, and pulls its answers together, as R-Drop does."""

    def compute_loss(self, model, batch):
        ids = batch["input_ids"]
        one, other = (model(input_ids=each, use_cache=False).logits for each in (ids, (ids + 1) % 97))
        loss = super().compute_loss(model, batch)
        return loss + 0.1 * (one - other).square().mean(), {"apart": (one - other).abs().mean()}


class Functional(TrainingLoop):
    """Calls the model by functional_call alone, with every parameter moved a little along itself."""

    def compute_loss(self, model, batch):
        moved = {name: parameter * 1.01 for name, parameter in model.named_parameters()}
        kept = batch["labels"][:, 1:] != -100
        logits = functional_call(model, moved, kwargs={"input_ids": batch["input_ids"], "use_cache": False}).logits
        return nn.functional.cross_entropy(logits[:, :-1][kept], batch["labels"][:, 1:][kept])


class Sharpness(TrainingLoop):
    """Takes the gradient twice, the second time a little up the first: SAM."""

    def accumulate_gradients(self, batches):
        super().accumulate_gradients(batches)
        moved = [(p, p.grad.clone()) for p in self.model.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter, gradient in moved:
                parameter.add_(gradient, alpha=1e-3)
        metrics = super().accumulate_gradients(batches)
        with torch.no_grad():
            for parameter, gradient in moved:
                parameter.sub_(gradient, alpha=1e-3)
        return metrics


class SometimesUsed(TrainingLoop):
    """Has a parameter that only some batches use, and one that none does."""

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        if batch["input_ids"].numel() > 9:
            loss = loss + (model.sometimes * batch["input_ids"].float().mean() / 97).sin().sum()
        return loss


class Aware(SharpnessAware):
    """Moves so far that the sharpness, a difference of two losses, is well above their rounding."""

    rho = 1.0


class Adaptive(Aware):
    """Its move is another for large weights than for small ones."""

    adaptive = True


class Drawing(TrainingLoop):
    """Its step and its penalty draw at random."""

    def penalty(self):
        return (self.model.lm_head.weight * torch.randn(97, 28)).sum() * 1e-2


def with_lora(model):
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    attach(model, LoRA(rank=3, alpha=6))  # the main process's draws are everyone's
    return model


def with_extra(model):
    model.sometimes, model.never = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3))
    return model


def near_start(model):
    return 0.5 * (model.lm_head.weight - 0.01).square().sum() + model.model.norm.weight.square().sum()


ROWS = uneven_rows(13)
HOLES = [{**row, "labels": [-100] * len(row["labels"])} if i in (1, 2) else row for i, row in enumerate(ROWS)]

FEW = {"max_steps": 6}
CASES = {  # name: (model, loop, settings, rows, penalties)
    "full": (tiny_llama, TrainingLoop, {}, ROWS, ()),
    "lora": (lambda: with_lora(tiny_llama()), TrainingLoop, {}, ROWS, ()),
    "holes": (tiny_llama, TrainingLoop, {"rows_per_step": 3, "rows_per_micro_batch": 1}, HOLES, ()),
    "epochs": (tiny_llama, TrainingLoop, {"max_steps": None, "epochs": 3, "rows_per_step": 5}, ROWS, ()),
    "sometimes": (lambda: with_extra(tiny_llama()), SometimesUsed, FEW | {"rows_per_micro_batch": 1}, ROWS, ()),
    "penalty": (tiny_llama, TrainingLoop, FEW, ROWS, (near_start,)),
    "drawing": (tiny_llama, Drawing, FEW, ROWS, ()),
    "clipped": (tiny_llama, TrainingLoop, FEW | {"clip_norm": 0.1}, ROWS, ()),
    "twice": (tiny_llama, Twice, FEW, ROWS, ()),
    "twice lora": (lambda: with_lora(tiny_llama()), Twice, {}, ROWS, ()),
    "functional": (tiny_llama, Functional, FEW, ROWS, ()),
    "sharpness": (tiny_llama, Sharpness, FEW, ROWS, ()),
    "aware": (tiny_llama, Aware, FEW, ROWS, ()),
    "adaptive": (tiny_llama, Adaptive, FEW, ROWS, ()),
    "bf16": (tiny_llama, TrainingLoop, FEW | {"precision": "bf16"}, ROWS, ()),
    "fp16": (tiny_llama, TrainingLoop, FEW | {"precision": "fp16"}, ROWS, ()),
    "tied": (lambda: tiny_llama(tied=True), TrainingLoop, FEW, ROWS, ()),
}


def make(name, *, sharded=False, mesh=None, **more):
    """Return the loop of a case."""
    model, kind, changed, rows, penalties = CASES[name]
    model = model()
    if sharded:
        shard(model, mesh=mesh)
    run = {"max_steps": 20, "rows_per_step": 8, "rows_per_micro_batch": 2, "learning_rate": 1e-3, "progress": False,
           "eval_every": 5} | changed | more  # fmt: skip
    settings = LoopSettings(**run)
    return kind(model, rows, settings=settings, eval_data=uneven_rows(5), penalties=penalties)


def weights(model):
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def gradients(model):
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def measured(name, sharded=False):
    """Return the gradient of a case's first step, and the weights and history of its run."""
    return gone_through(make(name, sharded=sharded))


def gone_through(loop):
    """Return the gradient of a loop's first step, and the weights and history of its run."""
    loop.model.train()
    torch.manual_seed(5)
    loop.ranks.start_equal(loop.model)
    loop.accumulate_gradients(loop.micro_batches(0))
    first = gradients(loop.model)
    loop.model.zero_grad()
    history = loop.fit()
    return first, weights(loop.model), [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def off(found, wanted):
    """Return by how much of the norm of all wanted tensors the found ones are off."""
    assert found.keys() == wanted.keys()
    size = sum(float(value.double().square().sum()) for value in wanted.values()) ** 0.5
    return sum(float((found[n].double() - wanted[n].double()).square().sum()) for n in wanted) ** 0.5 / size
