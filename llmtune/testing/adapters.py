"""The laws of an adapter layer: invisible until trained, honest when trained, gone without a trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close

IN, OUT, ROWS = 11, 7, 5


EXEMPTIONS = {  # name: (law, the tensors it does not hold for, reason)
    "norm held constant": (
        "true gradients",
        ("lora_a", "lora_b"),
        "no gradient goes through the norm (DoRA's paper, section 4.3), so finite differences see more than it",
    ),
    "start to the digit": (
        "unseen at the start",
        (),
        "the start is no zero but a product that cancels: the output is the base's to rounding, which is checked",
    ),
}


def check_adapter(make: Callable[[nn.Linear], nn.Module], *, exempt: Sequence[str] = ()) -> None:
    """Check the laws of an adapter around a linear layer.

    - unseen at the start: the output is the base's, bit for bit;
    - the base stays: three optimizer steps on the adapter's parameters leave the base's bit-identical, and change the
      output;
    - true gradients: in float64 the gradients of all trained parameters and of the input agree with finite differences;
    - quiet in eval: two forward passes in eval mode agree bit for bit;
    - nothing shared: two adapters made alike share no storage, and trained parameters none with the base;
    - kept whole: one made anew that loads the other's `state_dict()` gives the same output, bit for bit;
    - off is off: with `active = False` (where the module has it) the output is the base's, bit for bit;
    - honest change: with `deltas()` (where it has it), base weights plus deltas give the adapter's output.

    A module without `active` or `deltas` is not asked about them. Trained parameters are those that require a gradient;
    they are moved off their start before gradients are tested.

    Args:
        make: `make(linear) -> module`, the adapter around an `nn.Linear`; called several times.
        exempt: names from `EXEMPTIONS`, each of a law that by design fails for some tensors; the reason is printed.

    Raises:
        LawBroken: names the law and by how much.
        ValueError: there is no such exemption.
    """
    unknown = [name for name in exempt if name not in EXEMPTIONS]
    if unknown:
        raise ValueError(f'there is no exemption "{unknown[0]}", only {", ".join(EXEMPTIONS)}')
    left_out: dict[str, tuple[str, ...]] = {}
    for law, names, reason in (EXEMPTIONS[name] for name in exempt):
        print(f"not checked: {law} of {' and '.join(names)}: {reason}")
        left_out[law] = names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for law, check in _LAWS.items():
            check(make, left_out[law]) if law in left_out else check(make)


def _linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, ROWS, IN, dtype=dtype)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def _moved(module: nn.Module) -> nn.Module:
    for parameter in _trained(module).values():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def _same(actual: Tensor, expected: Tensor, law: str) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise LawBroken(
            f"{law}: expected {tuple(expected.shape)} of {expected.dtype}, got {tuple(actual.shape)} of {actual.dtype}"
        )
    if not torch.equal(actual, expected):
        raise LawBroken(
            f"{law}: off by {float((actual - expected).detach().abs().max()):.3g}, expected no difference at all"
        )


def _unseen_at_the_start(make: Callable[[nn.Linear], nn.Module], to_rounding: Sequence[str] | None = None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, x = _linear(dtype), _input(dtype)
        expected = base(x)
        for mode in (False, True):
            actual, law = make(copy.deepcopy(base)).train(mode)(x), f"unseen at the start ({dtype}, training={mode})"
            if to_rounding is None:
                _same(actual, expected, law)
            else:
                assert_close(actual, expected, rtol=16 * torch.finfo(dtype).eps, what=law)


def _base_stays(make: Callable[[nn.Linear], nn.Module]) -> None:
    base, x = _linear(), _input()
    before = copy.deepcopy(base)
    module = make(base)
    if not _trained(module):
        raise LawBroken(
            "the base stays: the adapter has no parameter that requires a gradient, so it cannot be trained"
        )
    optimizer = torch.optim.AdamW(_trained(module).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
    for name, parameter in base.named_parameters():
        _same(parameter, before.get_parameter(name), f"the base stays: {name}")
    with torch.no_grad():
        if torch.equal(module.eval()(x), before(x)):
            raise LawBroken(
                "the base stays: three optimizer steps did not change the output; the adapter does not learn"
            )


def _true_gradients(make: Callable[[nn.Linear], nn.Module], left_out: Sequence[str] = ()) -> None:
    module = _moved(make(_linear(torch.float64)).double()).eval()
    x = _input(torch.float64).requires_grad_(True)
    trained = _trained(module)
    direction = torch.randn(2, ROWS, OUT, dtype=torch.float64)
    gradients = torch.autograd.grad((module(x) * direction).sum(), [*trained.values(), x], allow_unused=True)
    step = 1e-6
    for (name, tensor), gradient in zip([*trained.items(), ("the input", x)], gradients, strict=True):
        if name in left_out:
            continue
        change = torch.randn_like(tensor)
        with torch.no_grad():
            values = []
            for sign in (step, -2 * step):
                tensor += sign * change
                values.append((module(x) * direction).sum())
            tensor += step * change
        numeric = float(values[0] - values[1]) / (2 * step)
        found = 0.0 if gradient is None else float((gradient * change).sum())
        if not abs(found - numeric) <= 1e-5 * max(abs(numeric), 1e-3):
            raise LawBroken(
                f"true gradients: along a random direction {name} has slope {numeric:.9g}, "
                f"its gradient says {found:.9g}"
            )


def _quiet_in_eval(make: Callable[[nn.Linear], nn.Module]) -> None:
    module, x = _moved(make(_linear())).eval(), _input()
    _same(module(x), module(x), "quiet in eval: a second forward pass")


def _nothing_shared(make: Callable[[nn.Linear], nn.Module]) -> None:
    base = _linear()
    one, other = make(base), make(_linear())
    own = {parameter.untyped_storage().data_ptr() for parameter in base.parameters()}
    first = {p.untyped_storage().data_ptr(): name for name, p in _trained(one).items()}
    for name, parameter in (*_trained(one).items(), *_trained(other).items()):
        storage = parameter.untyped_storage().data_ptr()
        if storage in own:
            raise LawBroken(f"nothing shared: the trained parameter {name} lies in the base's storage")
        if storage in first and all(parameter is not mine for mine in _trained(one).values()):
            raise LawBroken(f"nothing shared: {name} of one adapter lies in the storage of {first[storage]} of another")
    if {id(p) for p in _trained(one).values()} & {id(p) for p in _trained(other).values()}:
        raise LawBroken("nothing shared: two adapters hold the same parameter")


def _kept_whole(make: Callable[[nn.Linear], nn.Module]) -> None:
    base, x = _linear(), _input()
    one, other = _moved(make(copy.deepcopy(base))).eval(), make(copy.deepcopy(base)).eval()
    other.load_state_dict(one.state_dict())
    _same(other(x), one(x), "kept whole: the output after load_state_dict")


def _off_is_off(make: Callable[[nn.Linear], nn.Module]) -> None:
    base, x = _linear(), _input()
    module = _moved(make(copy.deepcopy(base))).eval()
    if not hasattr(module, "active"):
        return
    module.active = False  # type: ignore[assignment]
    _same(module(x), base(x), "off is off")


def _honest_change(make: Callable[[nn.Linear], nn.Module]) -> None:
    module, x = _moved(make(_linear(torch.float64)).double()).eval(), _input(torch.float64)
    deltas = getattr(module, "deltas", None)
    if not callable(deltas) or not deltas():
        return
    plain = nn.Linear(IN, OUT, dtype=torch.float64)
    base = next(m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.shape == plain.weight.shape)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(base.get_parameter(name) + deltas().get(name, 0.0))
    assert_close(module(x), plain(x), rtol=1e-9, what="honest change: the output against base weights plus deltas")


_LAWS: dict[str, Callable[..., None]] = {
    "unseen at the start": _unseen_at_the_start,
    "the base stays": _base_stays,
    "true gradients": _true_gradients,
    "quiet in eval": _quiet_in_eval,
    "nothing shared": _nothing_shared,
    "kept whole": _kept_whole,
    "off is off": _off_is_off,
    "honest change": _honest_change,
}
