"""The penalties' laws, run on ours, on a user's, and on penalties that break them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters.attach import adapter_layers, adapter_names, adapter_parameters, attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.effective import anchor_of, effective_parameters
from llmtune.errors import LawBroken
from llmtune.forgetting.ewc import EWC
from llmtune.forgetting.mas import MemoryAwareSynapses
from llmtune.forgetting.online_ewc import OnlineEWC
from llmtune.forgetting.orthogonal_lora import OrthogonalLoRA
from llmtune.forgetting.synaptic import SynapticIntelligence
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.regularizers.l2sp import L2SP
from llmtune.testing.penalties import check_penalty
from llmtune.testing.small import SmallModel, moved, trainable

PATH_DAMPING = 0.01
INPUTS = torch.randn(4, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def weights_of(anchor):
    """Return a made-up Fisher information: seeded, a pure function of the names and shapes."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.rand(value.shape, generator=generator) for name, value in sorted(anchor.items())}


def ewc(model, *, strength=3.0, from_tensors=False):
    anchor = anchor_of(model)
    return EWC(weights_of(anchor), anchor if from_tensors else model, strength)


def ewc_formula(model, anchor, *, strength=3.0):
    now, then = anchor_of(model), anchor_of(anchor)
    fisher = weights_of(then)
    return strength / 2 * sum((fisher[n].double() * (now[n] - then[n]).square()).sum() for n in fisher)


def online_ewc(model, *, strength=3.0):
    """Two tasks, both of which ended where the model is."""
    penalty, fisher = OnlineEWC(strength, gamma=0.5), weights_of(anchor_of(model))
    penalty.finish_task(model, fisher={name: 0.25 * value for name, value in fisher.items()})
    penalty.finish_task(model, fisher={name: 0.875 * value for name, value in fisher.items()})
    return penalty


def synaptic(model, *, strength=3.0):
    """One step of SGD that brings a copy, moved away, back to about where the model is; held where the model is."""
    twin, penalty = moved(copy.deepcopy(model), seed=11), SynapticIntelligence(strength, damping=PATH_DAMPING)
    optimizer = torch.optim.SGD(trainable(twin).values(), lr=1.0)
    penalty.attach(twin, optimizer)
    penalty.start_step()
    for name, parameter in twin.named_parameters():
        parameter.grad = torch.ones_like(parameter)
        if parameter.requires_grad and name in trainable(model):
            parameter.grad = (parameter - model.get_parameter(name)).detach()
    penalty.task_gradients()
    optimizer.step()
    penalty.finish_task(model)
    return penalty


def synaptic_formula(model, anchor, *, strength=3.0):
    """By the effective weights before and after that one step: path = -g * change, over change^2 + damping."""
    now, then, start = anchor_of(model), anchor_of(anchor), moved(copy.deepcopy(anchor), seed=11)
    before, total = anchor_of(start), 0.0
    for name, value in then.items():
        own = effective_parameters(start)[name].parameter
        g = before[name] - value if own.requires_grad else torch.ones_like(value)
        change = value - before[name]
        importance = (-g * change).clamp(min=0) / (change.square() + PATH_DAMPING)
        total = total + (importance * (now[name] - value).square()).sum()
    return strength / 2 * total


def mas(model, *, strength=3.0):
    penalty = MemoryAwareSynapses(strength)
    penalty.finish_task(model, [INPUTS])
    return penalty


def mas_formula(model, anchor, *, strength=3.0):
    """By autograd through each effective weight, one input after the other."""
    now, then = anchor_of(model), anchor_of(anchor)
    bare = SmallModel().eval()
    with torch.no_grad():
        for name, value in then.items():
            bare.get_parameter(name).copy_(value)
        for name, entry in effective_parameters(anchor).items():
            bare.get_parameter(name).copy_(entry.value())
    bare.requires_grad_(True)
    total = dict.fromkeys(then, 0.0)
    for x in INPUTS:
        found = torch.autograd.grad(bare(x[None]).square().sum(), [bare.get_parameter(name) for name in then])
        for name, gradient in zip(then, found, strict=True):
            total[name] = total[name] + gradient.abs() / len(INPUTS)
    return strength / 2 * sum((total[n].float().double() * (now[n] - then[n]).square()).sum() for n in then)


def adapted(*, trained=False, **options):
    model = SmallModel()
    torch.manual_seed(0)
    attach(model, LoRA(rank=2, alpha=5, targets=["head"], dtype=torch.float64, **options))
    if trained:
        moved(model, seed=5)
    return model


def two_adapters():
    model = adapted(trained=True)
    attach(model, LoRA(rank=3, alpha=2, targets=["head"], dtype=torch.float64), name="second_task")
    return model


def l2sp(model, *, strength=3.0, from_tensors=False):
    return L2SP(anchor_of(model) if from_tensors else model, strength)


def l2sp_formula(model, anchor, *, strength=3.0):
    now, then = anchor_of(model), anchor_of(anchor)
    return strength / 2 * sum((now[n] - value).square().sum() for n, value in then.items())


def all_low_rank(*, adapters=1):
    """Return a model on which nothing is trained but low-rank changes from B = 0, all of the last adapter."""
    model = adapted()
    for number in range(1, adapters):
        moved(model, seed=number)
        attach(model, LoRA(rank=3, alpha=2, targets=["head"], dtype=torch.float64), name=f"task_{number}")
    return model


def delta_norm(model, *, strength=3.0):
    return DeltaNorm(strength, name=adapter_names(model)[-1])


def delta_norm_formula(model, anchor, *, strength=3.0):
    (layer,) = adapter_layers(model, adapter_names(model)[-1])
    return strength / 2 * (layer.scaling * layer.lora_b @ layer.lora_a).square().sum()


def other_rows():
    """Return a model whose newer LoRA reads other entries of the input than the one of the task before."""
    model = SmallModel()
    for name, first in (("old", 0), ("new", 2)):
        attach(model, LoRA(rank=2, alpha=3, targets=["head"], dtype=torch.float64), name)
        (layer,) = adapter_layers(model, name)
        with torch.no_grad():
            layer.lora_a.zero_()
            layer.lora_a[0, first], layer.lora_a[1, first + 1] = 2.0, -3.0
    return model


def orthogonal_lora_formula(model, anchor, *, form, strength=3.0):
    new, old = (adapter_layers(model, name)[0].lora_a.detach() for name in ("new", "old"))
    total = 0.0
    for a in new:
        for b in old:
            product = (a * b).sum()
            terms = {"normalised": product**2 / (a @ a) / (b @ b), "paper": product**2, "code": product.abs()}
            total = total + terms[form]
    return strength * total


def user_penalty(model):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    return lambda m: sum((p - start[name]).square().sum() for name, p in m.named_parameters())


def user_formula(model, anchor):
    return sum((p - q).square().sum() for p, q in zip(model.parameters(), anchor.parameters(), strict=True))


MODELS = {
    "plain": SmallModel,
    "lora": adapted,
    "lora, trained": partial(adapted, trained=True),
    "lora, biases and a copy": partial(adapted, train_bias="all", train_modules=["norm"]),
    "lora, trained, biases and a copy": partial(adapted, trained=True, train_bias="all", train_modules=["norm"]),
    "two adapters": two_adapters,
}
PENALTIES = {
    "EWC from the model": (ewc, ewc_formula),
    "EWC from tensors": (partial(ewc, from_tensors=True), ewc_formula),
    "online EWC": (online_ewc, ewc_formula),
    "synaptic intelligence": (synaptic, synaptic_formula),
    "memory aware synapses": (mas, mas_formula),
    "L2SP from the model": (l2sp, l2sp_formula),
    "L2SP from tensors": (partial(l2sp, from_tensors=True), l2sp_formula),
    "a user's": (user_penalty, user_formula),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("model", MODELS)
def test_penalties_keep_the_laws(penalty, model):
    make, closed_form = PENALTIES[penalty]
    check_penalty(make, model=MODELS[model](), closed_form=closed_form)


@pytest.mark.parametrize("adapters", [1, 2])
def test_the_delta_norm_keeps_the_laws(adapters):
    """Its anchor is no change at all, so it is made for models whose adapter is at its start."""
    check_penalty(delta_norm, model=all_low_rank(adapters=adapters), closed_form=delta_norm_formula)


@pytest.mark.parametrize("form", ["normalised", "paper", "code"])
def test_o_lora_keeps_the_laws(form):
    """It is 0 where no row of A shares anything with those of the task before."""
    check_penalty(
        lambda model: OrthogonalLoRA(3.0, form),
        model=other_rows(),
        closed_form=partial(orthogonal_lora_formula, form=form),
    )


# --- faults ---------------------------------------------------------------------------------------------------------


class Base:
    """A right penalty, for the faults below to spoil."""

    def __init__(self, model):
        self.start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def __call__(self, model):
        return sum((p - self.start[name]).square().sum() for name, p in model.named_parameters())


class NotZero(Base):
    def __call__(self, model):
        return super().__call__(model) + 1e-6


class Slanted(Base):
    def __call__(self, model):
        return sum((p - self.start[name]).sum() for name, p in model.named_parameters())


class HalfDetached(Base):
    def __call__(self, model):
        return sum(((p - self.start[n]) * (p - self.start[n]).detach()).sum() for n, p in model.named_parameters())


class HoldsNothing(Base):
    def __call__(self, model):
        return 0.0 * super().__call__(model)


class NoGradient(Base):
    def __call__(self, model):
        return super().__call__(model).detach()


class NotAScalar(Base):
    def __call__(self, model):
        return super().__call__(model)[None]


class Doubled(Base):
    def __call__(self, model):
        return 2 * super().__call__(model)


class Aliased(Base):
    def __init__(self, model):
        super().__init__(model)
        self.start["norm.bias"] = model.norm.bias.detach()


class MovesAWeight(Base):
    def __call__(self, model):
        with torch.no_grad():
            model.norm.bias *= 1.5
        return super().__call__(model)


class DropsGradients(Base):
    def __call__(self, model):
        model.zero_grad()
        return super().__call__(model)


class Unfreezes(Base):
    def __call__(self, model):
        model.requires_grad_(True)
        return super().__call__(model)


class SwitchesMode(Base):
    def __call__(self, model):
        model.eval()
        return super().__call__(model)


class Draws(Base):
    def __call__(self, model):
        torch.rand(1)
        return super().__call__(model)


class Grows(Base):
    calls = 0

    def __call__(self, model):
        self.calls += 1
        return self.calls * super().__call__(model)


class Stateful(Base):
    """Right: starts unanchored copies from its state."""

    def state_dict(self):
        return {"start": {name: value.clone() for name, value in self.start.items()}}

    def load_state_dict(self, state):
        self.start = {name: value.clone() for name, value in state["start"].items()}


class ForgetsItsState(Stateful):
    def state_dict(self):
        return {"start": {name: torch.zeros_like(value) for name, value in self.start.items()}}


class SharesItsState(Stateful):
    def state_dict(self):
        return {"start": self.start}


class SharesWhatItTook(Stateful):
    def load_state_dict(self, state):
        self.start = state["start"]


class NoJson(Stateful):
    def state_dict(self):
        return {**super().state_dict(), "model": object()}


class NumberedKeys(Stateful):
    def state_dict(self):
        return {**super().state_dict(), "more": {0: 1}}


FAULTS = [
    (NotZero, "zero at the anchor: the penalty is 1e-06"),
    (Slanted, "zero at the anchor: the gradient of first.weight is up to 1 there"),
    (HalfDetached, "numeric gradient: along first.weight"),
    (HoldsNothing, "numeric gradient: on a moved model the gradient is 0 everywhere"),
    (NoGradient, "the penalty carries no gradient"),
    (NotAScalar, r"a penalty returns a scalar tensor; got \[1\]"),
    (Doubled, "closed form: the penalty of a moved model"),
    (Aliased, "anchors are copies: after the model has moved"),
    (MovesAWeight, "no trace: calling the penalty changes the model's weight norm.bias"),
    (DropsGradients, "no trace: calling the penalty changes the model's gradient of"),
    (Unfreezes, "no trace: calling the penalty changes the model's requires_grad flag of scale"),
    (SwitchesMode, "no trace: calling the penalty changes the model's mode of the root"),
    (Draws, "no trace: calling the penalty changes the model's random state"),
    (Grows, "same twice: the first call gives"),
    (ForgetsItsState, "state round-trips: the penalty"),
    (SharesItsState, "state round-trips: after the state is written to, the penalty"),
    (SharesWhatItTook, "state round-trips: after the state is written to, the other"),
    (NoJson, "state round-trips: state.model is a object, neither a tensor nor JSON"),
    (NumberedKeys, "state round-trips: keys must be strings; state.more has 0"),
]


@pytest.mark.parametrize(("kind", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_penalty_that_breaks_a_law_is_caught(kind, message):
    with pytest.raises(LawBroken, match=message):
        check_penalty(kind, closed_form=user_formula if kind is Doubled else None)


def test_a_right_penalty_with_state_passes():
    check_penalty(Stateful, closed_form=user_formula)


def test_the_model_given_is_not_changed():
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    check_penalty(ewc, model=model)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


def test_ewc_that_pulls_a_and_b_apart_is_no_ewc_of_the_effective_weight():
    """The closed form is that of W + s B A, not of A and B."""

    def on_factors(model):
        names = list(adapter_parameters(model))
        start = {name: model.get_parameter(name).detach().clone() for name in names}
        return lambda m: sum((m.get_parameter(name) - start[name]).square().sum() for name in names)

    with pytest.raises(LawBroken, match="closed form"):
        check_penalty(on_factors, model=adapted(trained=True), closed_form=ewc_formula)


def test_the_small_model_is_what_it_says():
    model = SmallModel()
    assert isinstance(model, nn.Module)
    assert model.first.weight is model.second.weight
    assert "second.weight" not in effective_parameters(model)
    assert not model.scale.requires_grad
    assert all(p.dtype == torch.float64 for p in model.parameters())
