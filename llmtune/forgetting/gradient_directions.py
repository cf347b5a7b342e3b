"""Directions in which old outputs would change: gradients of logits of stored examples, orthonormal (OGD)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llmtune.errors import did_you_mean
from llmtune.forgetting.fisher import labelled_examples
from llmtune.forgetting.likelihood import predict
from llmtune.gradients.per_example import undisturbed
from llmtune.modules import check_module, unwrap
from llmtune.optim.changed_update import full_float32
from llmtune.optim.joint_projection import project_jointly
from llmtune.types import Batch

Logits = Literal["label", "all"]
DEPENDENT = 1e-4  # a gradient of which less than this share is new is taken for a sum of those before


def gradient_directions(
    model: nn.Module,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    *,
    most: int,
    logits: Logits = "label",
    parameters: Collection[str] | Callable[[str], bool] | None = None,
    extend: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return an orthonormal basis of the gradients of examples' logits, each over all trained parameters at once (OGD).

    v_n = d f(x_n)[label of n] / d theta, then Gram-Schmidt, twice for each:  v <- v - sum_i <v, d_i> d_i

    A change of the parameters that is orthogonal to all of them leaves those logits as they are, to first order around
    where they were taken; `JointProjection` keeps it so. Over tokens, f is the mean of the logits at the example's
    labelled places. Of the loss one would get nothing: its gradient vanishes as the task is learned.

    Memory: `most` copies of the parameters in float32, and those of `extend`: LoRA's are few. The examples are read in
    order, and no more once `most` directions are found; gradients of which less than 1e-4 is new are passed by.

    Where we differ: TRACE's `OGD.py` appends one buffer again and again, so that its basis is one gradient and
    rounding, and never looks at its limit.

    Args:
        model: a Hugging Face model with a head, or any module that returns logits [n, C]; with or without adapters.
        batches: as for `diagonal_fisher`: dicts with "labels", or pairs (inputs, targets). Read once.
        most: how many directions to add, at least 1.
        logits: "label": the logit of each label, a direction an example (OGD-GTL). "all": every class's, C an example
            (OGD-ALL); for labels [B] of classes.
        parameters: the model's own names, or a function of a name; left out, all that is trained.
        extend: directions of earlier tasks, which come first, unchanged.

    Returns:
        {name: [k, *shape]}, float32, one k for all, on the parameters' devices: `safetensors.torch.save_file` takes it.

    Raises:
        ValueError: `most` or `logits` is out of range; a name is not the model's, or nothing is trained; the examples
            have no target, or gradients of 0 or NaN alone; or `extend` is of other parameters.
        TypeError: `batches` is a single batch.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> old = (torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 1, 0]))
        >>> directions = gradient_directions(model, [old], most=3)
        >>> {name: list(value.shape) for name, value in directions.items()}
        {'weight': [3, 2, 3], 'bias': [3, 2]}

    Farajtabar et al. 2020, "Orthogonal gradient descent for continual learning", section 3 and algorithm 1.
    """
    check_module(model)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise ValueError(f"most must be a whole number of at least 1; got {most!r}")
    if logits not in get_args(Logits):
        raise ValueError(f'logits must be "label" or "all"; got {logits!r}')
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    inner = unwrap(model)
    trained = _chosen(inner, parameters)
    first = _start(trained, extend)
    found = {name: torch.cat([first[name], first[name].new_zeros(most, *p.shape)]) for name, p in trained.items()}
    start = count = len(next(iter(first.values())))
    del first
    with undisturbed(inner, trained), full_float32(next(iter(trained.values())).device):
        for gradient in _gradients(inner, batches, trained, logits):
            count += _add(found, gradient, count)
            if count == start + most:
                break
    if count == 0:
        raise ValueError("the examples give no direction: there are none with a target, or their gradients are 0")
    return found if count == start + most else {name: value[:count].clone() for name, value in found.items()}


def _chosen(model: nn.Module, parameters: Collection[str] | Callable[[str], bool] | None) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    if parameters is None:
        chosen = {name: p for name, p in every.items() if p.requires_grad}
    elif callable(parameters):
        chosen = {name: p for name, p in every.items() if parameters(name)}
    else:
        for name in [parameters] if isinstance(parameters, str) else parameters:
            if name not in every:
                raise ValueError(f'the model has no parameter "{name}".{did_you_mean(name, every)}')
        chosen = {name: every[name] for name in parameters}
    if not chosen:
        raise ValueError(f"none of the model's {len(every)} parameters is chosen: none is trained, or nothing matches")
    return chosen


def _start(trained: Mapping[str, nn.Parameter], extend: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the directions there are, [k, *shape] for each parameter; k = 0 without any."""
    if extend is None:
        return {name: p.detach().new_zeros(0, *p.shape, dtype=torch.float32) for name, p in trained.items()}
    if extend.keys() != trained.keys():
        other = sorted(extend.keys() ^ trained.keys())[0]
        raise ValueError(
            f'the directions to extend and what is trained differ in "{other}": are they another model\'s?'
        )
    for name, p in trained.items():
        if extend[name].shape[1:] != p.shape:
            raise ValueError(f"directions of {name} {[*p.shape]} must be [k, *shape]; got {[*extend[name].shape]}")
    return {name: extend[name].to(p.device, torch.float32) for name, p in trained.items()}


def _gradients(
    model: nn.Module, batches: Iterable[Any], trained: Mapping[str, nn.Parameter], logits: Logits
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of each logit that counts, float32, those of 0 left out by name."""
    for batch in batches:
        for example in labelled_examples(model, batch, next(iter(trained.values())).device):
            predictions = predict(model, example)
            rows = predictions.logits(predictions.rows)
            if logits == "all" and example["labels"].ndim != 1:
                raise ValueError('logits="all" is for labels of classes, [B]; these are labels of tokens, [B, T]')
            scores = rows[0].unbind() if logits == "all" else [rows.gather(1, predictions.labels[:, None]).mean()]
            for index, score in enumerate(scores):
                more = index + 1 < len(scores)
                given = torch.autograd.grad(score, list(trained.values()), retain_graph=more, allow_unused=True)
                yield {name: g.float() for name, g in zip(trained, given, strict=True) if g is not None}


@torch.no_grad()
def _add(found: dict[str, Tensor], gradient: dict[str, Tensor], count: int) -> int:
    """Write what is new of a gradient into row `count`, as a unit vector; return 1, or 0 where nothing is new."""
    size = _norm(gradient)
    if not torch.isfinite(size):
        raise ValueError("the gradient of a logit is not finite: the model gives NaN or overflows")
    if size == 0:
        return 0
    new = {name: value / size for name, value in gradient.items()}
    known = {name: value[:count] for name, value in found.items()}
    for _ in range(2 if count else 0):
        missing = {name: value.new_zeros(value.shape[1:]) for name, value in known.items() if name not in new}
        new = project_jointly(new | missing, known)
    left = _norm(new)
    if left < DEPENDENT:
        return 0
    for name, value in new.items():
        found[name][count] = value / left
    return 1


def _norm(vector: Mapping[str, Tensor]) -> Tensor:
    """Return the norm of tensors as one vector, a scalar on the CPU."""
    return torch.stack([value.norm().cpu() for value in vector.values()]).norm()
