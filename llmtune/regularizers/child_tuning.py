"""Child-Tuning: only a part of the weights, the child network, is updated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmtune.adapters.anchor import fingerprint
from llmtune.adapters.effective import effective_parameters
from llmtune.errors import CheckpointError, did_you_mean
from llmtune.modules import unwrap
from llmtune.optim.wrapped import inner_optimizer
from llmtune.regularizers.child_mask import check_share, child_mask
from llmtune.types import Callback


class ChildTuning(Callback):
    """Update only a child network: drawn anew at every step (F), or once and for all by Fisher information (D).

    F, without `fisher`: m ~ Bernoulli(p) for every entry, at every step, and theta <- theta + m / p * update, the
    update being what the optimizer would have added to theta. By plain SGD that is -lr * gradient * m / p, as in the
    paper. Under Adam the authors' program masks the gradient instead (`of="gradient"`). There 1/p cancels out, and
    the second moment is 1/p times as large beside the square of the first: a steady gradient moves a weight by
    sqrt(p) of what it should. Momentum and weight decay also move what was left out. Masking the update has none of
    that, and its mean is the whole update.

    D, with `fisher`: the child is the share `p` of all entries that `fisher` names, those with the largest values
    (`child_mask`). Gradients outside it are set to zero before clipping, and no weight outside it changes by a bit,
    whatever weight decay or momentum the optimizer has, or `DecoupledL2SP` beside it. Parameters that
    `fisher` does not name (a new classifier) are trained whole, as in the authors' program. Take the Fisher information
    of single examples (`llmtune.forgetting.diagonal_fisher`): the authors' is of batches, in train mode, and clipped
    tensor by tensor before it is squared.

    Masks are drawn once an optimizer step, from torch's global random state, which a `TrainingLoop` seeds for each
    step. Under adapters F works on the tensors that are trained, A and B; D needs weights that are trained themselves.
    What is held back is copied for the length of a step.

    Args:
        p: the child's share of the entries, above 0 and below 1.
        fisher: {bare name: tensor of the parameter's shape}, 0 or more; it is not kept.
        of: what F masks, "update" or "gradient".

    Raises:
        ValueError: `p` is out of range, `of` is neither, or says "gradient" beside `fisher`; or `fisher` is empty,
            negative or not finite.
        TypeError: an entry of `fisher` is no tensor of floats.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> child = ChildTuning(0.5, fisher={"weight": torch.tensor([[3.0, 1.0]])})
        >>> child.attach(model, optimizer)  # a TrainingLoop with callbacks=[child] does this by itself, and the next
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> child.mask_gradients()  # before clipping
        >>> optimizer.step()
        >>> (model.weight - before).round().tolist()
        [[-1.0, 0.0]]
        >>> child.detach()

    Reference:
        Xu et al. 2021, "Raise a child in large language model: towards effective and generalizable fine-tuning".
    """

    def __init__(
        self, p: float, *, fisher: Mapping[str, Tensor] | None = None, of: Literal["update", "gradient"] = "update"
    ) -> None:
        check_share(p)
        if of not in ("update", "gradient"):
            raise ValueError(f'of must be "update" or "gradient"; got {of!r}')
        if fisher is not None and of == "gradient":
            raise ValueError(
                'of="gradient" is for masks drawn at every step; with fisher both are masked: leave it out'
            )
        self.p, self.of = float(p), of
        self.child = None if fisher is None else child_mask(fisher, p)
        self._outside: dict[nn.Parameter, Tensor] = {}  # D: where a parameter must not change
        self._before: dict[nn.Parameter, Tensor] = {}  # values from before the step that is running
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[Any] = []

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hold back every step of the optimizer from now on.

        Args:
            model: the model that `fisher` belongs to.
            optimizer: of its parameters.

        Raises:
            ValueError: it is attached already; a parameter of the optimizer is spread over processes; or the model
                lacks a parameter that `fisher` names, or has it in another shape, frozen, or under an adapter.
        """
        if self._hooks:
            raise ValueError("this ChildTuning is attached already: detach it first, or make another one")
        optimizer = inner_optimizer(optimizer)
        if any(hasattr(p, "device_mesh") for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "ChildTuning masks whole parameters, and here are some that are spread over processes: train "
                "data-parallel, without sharding"
            )
        self._outside = {} if self.child is None else _outside(self.child, model)
        self._optimizer = optimizer
        if self.child is not None or self.of == "update":
            first = optimizer.register_step_pre_hook(self._remember)
            every: Any = optimizer._optimizer_step_pre_hooks  # an OrderedDict
            every.move_to_end(first.id, last=False)  # before hooks that move weights
            self._hooks.append(first)
            self._hooks.append(optimizer.register_step_post_hook(self._hold_back))

    def detach(self) -> None:
        """Hold back nothing any more; nothing where it is not attached."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._outside, self._before, self._optimizer = [], {}, {}, None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Mask the gradients that are there, once an optimizer step, before they are clipped; F of the update does not.

        Raises:
            ValueError: it is not attached.
        """
        if self._optimizer is None:
            raise ValueError("this ChildTuning is not attached to a model and its optimizer: attach it first")
        for parameter, outside in self._outside.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(outside, 0.0)
        if self.of == "gradient":
            for parameter in self._trained():
                assert parameter.grad is not None
                parameter.grad.copy_(torch.where(_drawn(parameter, self.p), parameter.grad / self.p, 0.0))

    def on_fit_start(self, loop: Any) -> None:
        """Attach to the loop's model and optimizer."""
        self.attach(loop.model, loop.optimizer)

    def on_before_optimizer_step(self, loop: Any) -> None:
        """Mask the gradients of the whole step."""
        self.mask_gradients()

    def on_fit_end(self, loop: Any) -> None:
        """Detach."""
        self.detach()

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Detach."""
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this one from another: its share, what it masks, and checksums of the child's masks."""
        child = {name: fingerprint(mask) for name, mask in (self.child or {}).items()}
        return {"p": self.p, "of": self.of, "child": child}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a saved state is this one's own; there is nothing to take back.

        Raises:
            CheckpointError: the share, what is masked, or the child network is another; names the first difference.
        """
        own = self.state_dict()
        for key in ("p", "of"):
            if state.get(key) != own[key]:
                raise CheckpointError(f"the saved ChildTuning had {key}={state.get(key)!r}; this one has {own[key]!r}")
        for name in (*own["child"], *state["child"]):
            if own["child"].get(name) != state["child"].get(name):
                raise CheckpointError(
                    f"the saved ChildTuning had another child network in {name}: make this one of the same fisher "
                    "(save it once, rather than computing it anew)"
                )

    def _trained(self) -> list[nn.Parameter]:
        """Return the optimizer's parameters that have a gradient."""
        assert self._optimizer is not None
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        held = self._trained() if self.child is None else list(self._outside)
        self._before = {parameter: parameter.detach().clone() for parameter in held}

    @torch.no_grad()
    def _hold_back(self, *_: Any) -> None:
        for parameter, before in self._before.items():
            if self.child is not None:
                parameter.copy_(torch.where(self._outside[parameter], before, parameter))
            else:
                moved = before + (parameter - before) / self.p
                parameter.copy_(torch.where(_drawn(parameter, self.p), moved, before))
        self._before = {}


def _outside(child: Mapping[str, Tensor], model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Return, by parameter, where it is outside the child network."""
    entries, found = effective_parameters(unwrap(model)), {}
    for name, mask in child.items():
        if name not in entries:
            raise ValueError(f'fisher names "{name}", which the model has not.{did_you_mean(name, entries)}')
        parameter, layers = entries[name].parameter, entries[name].layers
        if parameter.shape != mask.shape:
            raise ValueError(
                f"{name} is {[*parameter.shape]} in the model and {[*mask.shape]} in fisher: another model's?"
            )
        if layers or not parameter.requires_grad:
            why = f'changed by adapter "{layers[0].adapter_name}"' if layers else "frozen"
            raise ValueError(
                f"{name} is {why}: a child network is of weights that are trained themselves. Take the Fisher "
                "information of those, or give none (then masks are drawn at every step)"
            )
        found[parameter] = ~mask.to(parameter.device)
    return found


def _drawn(parameter: Tensor, p: float) -> Tensor:
    """Return a mask of the parameter's shape, each entry True with probability p, from the global random state."""
    return torch.empty(parameter.shape, device=parameter.device).bernoulli_(p).bool()
