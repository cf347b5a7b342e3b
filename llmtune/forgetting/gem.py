"""Averaged gradient episodic memory (A-GEM): a step must not go against the gradient of stored examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from llmtune.gradients.per_example import undisturbed
from llmtune.modules import unwrap
from llmtune.optim.changed_update import ChangedUpdate, wide
from llmtune.types import Batch, Callback, LossFunction

Key = TypeVar("Key", bound=Hashable)
Space = Literal["update", "gradient"]


@torch.no_grad()
def averaged_gem(
    gradients: Mapping[Key, Tensor | None], reference: Mapping[Key, Tensor | None]
) -> dict[Key, Tensor | None]:
    """Return the gradient, made not to point against a reference gradient.

    g                                       where <g, r> >= 0
    g - (<g, r> / ||r||^2) r                else,    g and r each all parameters as ONE vector

    The result has <g~, r> >= 0, to rounding, and is the nearest to g that has. What comes out must be what the weights
    move against: by SGD without momentum and weight decay the stored examples' loss then does not rise, to first order.
    By Adam, or with momentum, weight decay or clipping by entry, there is no such guarantee, since they give the step
    another direction than the gradient's; `ReferenceProjection` applies the same function to the step itself.

    Where we differ: TRACE's `GEM.py` projects parameter by parameter, which asks for more and gives another gradient;
    others fail where a head has no gradient in one of the two.

    Args:
        gradients: {key: tensor of any shape, or None}.
        reference: the same of the stored examples, {key: tensor of that shape, or None}. A key that is missing or None
            in one of the two counts as 0 there; None stays None.

    Returns:
        {key: tensor or None} for each of `gradients`; the very tensors where nothing is to be done, else new ones in
        the gradients' dtype, computed in at least float32.

    Raises:
        ValueError: the two have no tensor in common, or of another shape; or the reference is not finite.

    Example:
        >>> averaged_gem({"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([-1.0, 0.0])})
        {'a': tensor([0., 2.])}

    Chaudhry et al. 2019, "Efficient lifelong learning with A-GEM", equation 11.
    """
    pairs = _pairs(gradients, reference)
    largest = _largest(reference)
    if not largest:
        return dict(gradients)
    units = {key: wide(r) / largest for key, r in reference.items() if r is not None}  # squares neither vanish nor grow
    product = _total([(wide(g) * units[key]).sum() for key, (g, _) in pairs.items()])
    if not product < 0:
        return dict(gradients)
    square = _total([unit.square().sum() for unit in units.values()])
    found = dict(gradients)
    for key, (gradient, _) in pairs.items():
        found[key] = wide(gradient).sub(units[key], alpha=product / square).to(gradient.dtype)
    return found


def reference_gradients(
    model: nn.Module, batches: Iterable[Batch], *, loss: LossFunction
) -> dict[nn.Parameter, Tensor]:
    """Return the gradient of the mean loss over all targets of stored examples, by parameter.

    In eval mode, so without dropout, and without a trace: `.grad`, modes and the random state are as before. (avalanche
    takes it in train mode.) Computed outside wrappers: each of several processes takes all the batches.

    Args:
        model: the model as it is trained, with or without wrappers.
        batches: dicts for `loss(model, batch)`, on any device.
        loss: a `LossFunction`.

    Returns:
        {parameter: gradient of its shape} for what requires a gradient and has one.

    Raises:
        ValueError: no batch has a target, or the loss depends on nothing that is trained.
        TypeError: `batches` is a single batch.

    Example:
        >>> from llmtune.losses.causal_lm import causal_lm_loss
        >>> from llmtune.testing.models import tiny_llama
        >>> ids, model = torch.tensor([[5, 7, 11]]), tiny_llama()
        >>> reference = reference_gradients(model, [{"input_ids": ids, "labels": ids}], loss=causal_lm_loss)
        >>> reference[model.lm_head.weight].shape
        torch.Size([97, 28])
    """
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    inner = unwrap(model)
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    sums: dict[nn.Parameter, Tensor] = {}
    total = 0
    with undisturbed(inner, trained):
        for batch in batches:
            device = next(iter(trained.values())).device
            batch = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in batch.items()}
            count = loss.count_targets(batch)
            if not count:
                continue
            result = loss(inner, batch)
            value = (result[0] if isinstance(result, tuple) else result) * count
            if not value.requires_grad:
                raise ValueError("the loss of the stored examples depends on no parameter that is trained")
            given = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
            for parameter, gradient in zip(trained.values(), given, strict=True):
                if gradient is not None:
                    sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
            total += count
    if not total:
        raise ValueError("none of the stored examples has a target: there is no reference gradient")
    return {parameter: gradient / total for parameter, gradient in sums.items()}


class ReferenceProjection(ChangedUpdate):
    """A-GEM on the optimizer's update: no step goes against the stored examples, whatever the optimizer is.

    change                                        where <change, r> <= 0
    change - (<change, r> / ||r||^2) r            else,    over all parameters as one vector

    It is `averaged_gem` of minus the change, so that <theta_new - theta, r> <= 0 after momentum, Adam's
    preconditioning, weight decay and clipping: the stored examples' loss does not rise, to first order. Give
    `reference` anew before each step, as `averaged_gem`'s use in `TrainingLoop` shows in nine lines:

        class AveragedGEM(TrainingLoop):
            def configure_optimizer(self):
                optimizer, schedule = super().configure_optimizer()
                self.projection = ReferenceProjection(optimizer)
                return optimizer, schedule

            def accumulate_gradients(self, batches):
                self.projection.reference = reference_gradients(self.model, stored(self.step), loss=self.loss)
                return super().accumulate_gradients(batches)

    A parameter without a reference gradient counts as 0 in it and is left alone. A step costs two copies of the
    parameters while it runs, and one of the gradients between.

    Args:
        optimizer: any torch optimizer that has been made; all of its parameters take part.

    Attributes:
        reference: {parameter: gradient of its shape, or None} of the stored examples, for one step; None after it.

    Raises:
        TypeError: `optimizer` is no torch optimizer, or a parameter is spread over processes.
        ValueError: a parameter's update is projected already.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> projection = ReferenceProjection(torch.optim.Adam([weight], lr=0.1))
        >>> projection.reference = {weight: torch.tensor([1.0, 0.0])}
        >>> weight.grad = torch.tensor([-3.0, -1.0])
        >>> projection.step()  # Adam alone would add 0.1 to both, against the reference
        >>> weight.data
        tensor([1.0000, 1.1000])
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        groups = getattr(optimizer, "param_groups", [])
        super().__init__(optimizer, [parameter for group in groups for parameter in group["params"]])
        self.reference: Mapping[Any, Tensor | None] | None = None

    def prepare(self) -> None:
        """Raise ValueError where there is no reference gradient for this step, or none that fits."""
        if self.reference is None:
            raise ValueError(
                "ReferenceProjection has no reference gradient for this step: set .reference before each, as to "
                "reference_gradients(...)"
            )
        _largest(self.reference)
        _pairs({parameter: parameter for parameter in self.parameters}, self.reference)

    def after(self, before: dict[Tensor, Tensor]) -> None:
        """Take out of the change what goes against the reference; see `ChangedUpdate.after`.

        Args:
            before: what each parameter was, of its shape.
        """
        reference, self.reference = self.reference, None
        assert reference is not None  # `prepare` has looked
        against: dict[Tensor, Tensor | None] = {p: wide(old) - wide(p) for p, old in before.items()}
        for parameter, kept in averaged_gem(against, reference).items():
            if kept is not None and kept is not against[parameter]:
                parameter.copy_(before[parameter] - kept)


class AveragedGEM(Callback):
    """A-GEM in a `TrainingLoop`: before each step the gradient of stored examples, which the step must not go against.

    Args:
        memory: `memory(step)` returns the batches of stored examples for optimizer step `step`, from 0; a function of
            the step alone makes a resumed run the same run. They go to the loop's own loss.
        space: "update": the optimizer's step is projected (`ReferenceProjection`), which holds under Adam. "gradient":
            the gradient is, before penalties, clipping and the optimizer; here for comparison, as published. Under Adam
            it guarantees nothing: see `averaged_gem`.

    Raises:
        TypeError: `memory` cannot be called.
        ValueError: `space` is neither.

    Example:
        >>> from llmtune.data.collate import collate_packed
        >>> from llmtune.testing.models import tiny_llama
        >>> from llmtune.training import LoopSettings, TrainingLoop
        >>> old, new = ([{"input_ids": ids, "labels": ids}] * 4 for ids in ([5, 7, 11], [3, 2, 1]))
        >>> gem = AveragedGEM(lambda step: [collate_packed(old[:2])])
        >>> settings = LoopSettings(max_steps=2, rows_per_step=2, progress=False)
        >>> _ = TrainingLoop(tiny_llama(), new, settings=settings, callbacks=[gem]).fit()
    """

    def __init__(self, memory: Callable[[int], Iterable[Batch]], *, space: Space = "update") -> None:
        if not callable(memory):
            raise TypeError(f"memory must be a function that gives the batches for a step; got {memory!r:.60}")
        if space not in get_args(Space):
            raise ValueError(f'space must be "update" or "gradient"; got {space!r}')
        self.memory, self.space = memory, space
        self._projection: ReferenceProjection | None = None

    def on_fit_start(self, loop: Any) -> None:
        """Put the hooks on the loop's optimizer, where it is the update that is projected."""
        if self.space == "update":
            self._projection = ReferenceProjection(loop.optimizer)

    def on_task_gradients(self, loop: Any) -> None:
        """Take the reference gradient; project the loop's own where that is what is projected."""
        reference = reference_gradients(loop.model, self.memory(loop.step), loss=loop.loss)
        if self._projection is not None:
            self._projection.reference = reference
            return
        trained = {p: p.grad for p in unwrap(loop.model).parameters() if p.requires_grad}
        for parameter, gradient in averaged_gem(trained, reference).items():
            parameter.grad = gradient

    def on_fit_end(self, loop: Any) -> None:
        """Take the hooks off."""
        if self._projection is not None:
            self._projection.detach()
        self._projection = None

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Take the hooks off."""
        self.on_fit_end(loop)


def _largest(reference: Mapping[Key, Tensor | None]) -> float:
    """Return the largest absolute entry; raises where one is not finite."""
    sizes = [wide(r).abs().amax() for r in reference.values() if r is not None and r.numel()]
    if not sizes:
        return 0.0
    largest = float(torch.stack([size.to(sizes[0].device, torch.float32) for size in sizes]).amax())
    if not math.isfinite(largest):
        raise ValueError("the reference gradient is not finite: look at the loss of the stored examples")
    return largest


def _total(parts: list[Tensor]) -> float:
    """Return the sum of scalars, waiting once for the device they are on."""
    return (
        float(torch.stack([part.to(parts[0].device) for part in parts]).to("cpu", torch.float64).sum())
        if parts
        else 0.0
    )


def _pairs(
    gradients: Mapping[Key, Tensor | None], reference: Mapping[Key, Tensor | None]
) -> dict[Key, tuple[Tensor, Tensor]]:
    """Return the tensors, of one shape, that both have."""
    pairs = {}
    for key, gradient in gradients.items():
        other = reference.get(key)
        if gradient is None or other is None:
            continue
        if gradient.shape != other.shape:
            raise ValueError(f"a gradient is {[*gradient.shape]} and its reference {[*other.shape]}: another model's?")
        pairs[key] = (gradient, other)
    if not pairs and any(gradient is not None for gradient in gradients.values()):
        raise ValueError("the reference has no gradient of anything that has one now: is it another model's?")
    return pairs
