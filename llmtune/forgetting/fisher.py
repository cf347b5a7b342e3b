"""The diagonal of the Fisher information, example by example: how much each parameter matters to the predictions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from llmtune.adapters.effective import choose_parameters, differentiable
from llmtune.forgetting.likelihood import INPUTS, Kind, Unit, has_head, has_target, head_of, passes, predict
from llmtune.gradients.examples import split_examples
from llmtune.gradients.hooks import HookTape
from llmtune.gradients.per_example import ExampleGradients, Method, undisturbed
from llmtune.modules import unwrap
from llmtune.types import Batch


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    *,
    kind: Kind = "sampled",
    unit: Unit = "sequence",
    parameters: Collection[str] | Callable[[str], bool] | None = None,
    method: Method = "auto",
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the diagonal Fisher information of a model's parameters, by their bare names.

    F_i = E_x E_{y ~ p(y | x)} [ (d log p(y | x) / d theta_i)^2 ], the mean over examples of the squared gradient of ONE
    example's log-likelihood. Each example counts as if run alone: batch size, order and padding change nothing, and
    each document of a packed row is an example. Computed in eval mode, accumulated in float32; modes, `requires_grad`
    flags, `.grad` and the random state are as before afterwards, also where it raises. A model inside `torch.compile`
    or data-parallel wrappers is run without them, on this process's batches alone.

    Under an adapter the parameter is the effective weight W + s B A: its Fisher information stands under W's bare name,
    frozen or not. (That of A is exactly 0 while B = 0.)

    Args:
        model: a Hugging Face model with a head (causal, masked, encoder-decoder, sequence or token classification), or
            any module that returns logits [n, C].
        batches: dicts for `model(**batch)` with "labels", [B] of classes or [B, T] of tokens (unshifted, -100 ignored),
            padded or packed; or pairs (inputs [n, ...], targets [n]) for `model(inputs)`. Read once, and moved to the
            model's device. Labels say which places count even where targets are drawn. Floats, one an output of a
            regressor, are targets of a normal distribution of variance 1: divide by sigma^2 for another.
        kind: "sampled" draws every target from the model's own prediction at its place, with the given text before it:
            unbiased. "exact" takes the expectation over all classes: a backward pass for each, at each place.
            "empirical" takes the given labels: cheaper by a draw, and a biased estimate.
        unit: "sequence": the log-likelihood is the sum over an example's targets, and the mean is over examples.
            "token": the gradient is that of one target's log-likelihood, and the mean is over all targets; costs a
            backward pass for each.
        parameters: bare names, or a function of a bare name that says yes or no; left out, all that is trained: what
            requires a gradient, and what an active adapter changes.
        method: as in `per_example_gradients`.
        generator: draws the targets of "sampled"; left out, torch's own, which is put back afterwards.

    Returns:
        {bare name: float32 tensor of the parameter's shape, on its device}, 0 or more.

    Raises:
        ValueError: no example has a target; a name is unknown (says which are near); a parameter is of integers; the
            labels do not fit; "exact" would need too many passes; or the result is not finite.
        TypeError: `batches` is a single batch, or holds something else.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> fisher = diagonal_fisher(model, [(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))], kind="exact")
        >>> fisher["weight"].shape, bool((fisher["weight"] >= 0).all())
        (torch.Size([2, 3]), True)

    Reference:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks"; van de Ven 2025, "On the
        computation of the Fisher information in continual learning". Libraries that square the gradient of a whole
        batch's mean loss get a matrix about B times too small, and one that depends on the batch size.
    """
    check_kind(kind, unit)
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    inner = unwrap(model)
    chosen = choose_parameters(inner, parameters)
    with differentiable(inner, chosen) as tensors, undisturbed(inner, tensors):
        sums, count = _sums(inner, batches, tensors, kind, unit, method, generator)
    if count == 0:
        raise ValueError("no example has a target: the batches are empty, or all of their labels are -100")
    for name, total in sums.items():
        total /= count
        if not bool(total.isfinite().all()):
            raise ValueError(f"the Fisher information of {name} is not finite: the model gives NaN or overflows")
    return sums


def check_kind(kind: str, unit: str) -> None:
    """Raise ValueError where the kind of Fisher information, or its unit, is unknown."""
    for value, options, name in ((kind, Kind, "kind"), (unit, Unit, "unit")):
        if value not in get_args(options):
            raise ValueError(f"{name} must be one of {', '.join(get_args(options))}; got {value!r}")


def _sums(
    model: nn.Module,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    tensors: Mapping[str, nn.Parameter],
    kind: Kind,
    unit: Unit,
    method: Method,
    generator: torch.Generator | None,
) -> tuple[dict[str, Tensor], int]:
    """Return (sums of squared gradients by name, of how many examples or targets)."""
    # hooks must see the head run on the whole batch where its weight is chosen (or is tied to one that is)
    head_chosen = has_head(model) and bool(set(map(id, tensors.values())) & set(map(id, head_of(model).parameters())))

    def likelihood(group: Batch) -> Tensor:
        predictions = predict(model, group, whole_logits=head_chosen, regress=True)
        return predictions.log_likelihood(predictions.labels)

    sums = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in tensors.items()}
    count = 0
    engine = ExampleGradients(model, tensors, method, likelihood)
    for batch in batches:
        for _, group, tape in engine.groups(labelled_examples(model, batch, next(iter(tensors.values())).device)):
            with tape:
                whole = head_chosen and isinstance(tape, HookTape)
                predictions = predict(model, group, whole_logits=whole, regress=True)
            for score, weights, more in passes(predictions, kind, unit, generator):
                for name, rows, piece in tape.gradients(score, keep=more):
                    _add_squares(sums[name], piece.float(), None if weights is None else weights[rows].float())
            count += len(predictions.owner) if unit == "token" else predictions.examples
    return sums, count


def labelled_examples(model: nn.Module, batch: Any, device: torch.device) -> list[Batch]:
    """Return the examples of a batch that have a target, on the model's device."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        batch = {INPUTS: batch[0], "labels": batch[1]}
    if not isinstance(batch, dict):
        raise TypeError(f"a batch must be a dict of tensors or a pair (inputs, targets); got {type(batch).__name__}")
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return [example for example in split_examples(model, moved) if has_target(model, example)]


def _add_squares(total: Tensor, pieces: Tensor, weights: Tensor | None) -> None:
    """Add sum over n of weights[n] * pieces[n]^2 to `total` in place; weights None for ones."""
    if weights is None and len(pieces) == 1:
        total.addcmul_(pieces[0], pieces[0])
    else:
        total += pieces.square().sum(0) if weights is None else torch.tensordot(weights, pieces.square(), 1)
