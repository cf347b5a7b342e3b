"""The laws of a loss over rows of logits, for ours and for your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close

RowsLoss = Callable[[Tensor, Tensor], Tensor]
IGNORED = -100

EXEMPTIONS = {  # name: (law, reason)
    "rows coupled": (
        "sum over splits",
        "each row is compared with the others of its batch, so the loss of a part is another loss",
    ),
}


def check_loss(fn: RowsLoss, reference: RowsLoss, *, exempt: Sequence[str] = ()) -> None:
    """Check the laws of a loss that is a mean over rows, in float64.

    - equal to the reference: value and gradient, to 1e-10;
    - ignored rows: what stands in them, NaN included, changes neither value nor gradient, and they get gradient 0;
    - sum over splits: the means of two parts, times their counts, add up to the whole's;
    - order: permuting the rows changes nothing;
    - gradient: that of `fn` is its numeric one (`torch.autograd.gradcheck`).

    Args:
        fn: the loss to check: `fn(logits [N, C], targets [N]) -> scalar`, the mean over the rows whose target is
            not -100; logits float64 with gradient, targets in 0 ... C - 1 or -100.
        reference: the plain formula, called in the same way.
        exempt: names from `EXEMPTIONS`, each of a law that by design does not hold; the reason is printed.

    Raises:
        LawBroken: names the law, where it is broken, and by how much; or a law that the loss is exempt from holds.
        ValueError: there is no such exemption.

    Example:
        >>> def mine(logits, targets):
        ...     rows = targets != -100
        ...     return torch.nn.functional.cross_entropy(logits[rows], targets[rows])
        >>> def plain(logits, targets):
        ...     rows = targets != -100
        ...     return -logits[rows].log_softmax(-1)[range(rows.sum()), targets[rows]].mean()
        >>> check_loss(mine, plain)
    """
    unknown = [name for name in exempt if name not in EXEMPTIONS]
    if unknown:
        raise ValueError(f'there is no exemption "{unknown[0]}", only {", ".join(EXEMPTIONS)}')
    logits, targets = loss_inputs()
    loss_equals_reference(fn, reference, logits, targets)
    loss_ignores_rows(fn, logits, targets)
    if "rows coupled" in exempt:
        _loss_couples_rows(fn, logits, targets)
    else:
        loss_adds_up(fn, logits, targets)
    loss_has_no_order(fn, logits, targets)
    loss_has_its_gradient(fn, logits, targets)


def loss_inputs(*, rows: int = 13, classes: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (logits [N, C] float64, targets [N]), every third target -100, the first row's among them.

    Args:
        rows: N, 4 or more.
        classes: C.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (rows,), generator=generator)
    targets[::3] = IGNORED
    return logits, targets


def loss_equals_reference(fn: RowsLoss, reference: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    """Check that value and gradient are the reference's, to 1e-10.

    Args:
        fn: the loss to check.
        reference: the plain formula.
        logits: [N, C] float64.
        targets: [N] integers, -100 where a row has none.

    Raises:
        LawBroken: they differ.
    """
    value, gradient = _value_and_gradient(fn, logits, targets)
    expected, expected_gradient = _value_and_gradient(reference, logits, targets)
    assert_close(value, expected, rtol=1e-10, what="equal to the reference: loss")
    assert_close(gradient, expected_gradient, rtol=1e-10, what="equal to the reference: gradient")


def loss_ignores_rows(fn: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    """Check that NaN and infinity in ignored rows change neither value nor gradient, and that these rows get none.

    Args:
        fn: the loss to check.
        logits: [N, C] float64.
        targets: [N] integers, some -100.

    Raises:
        LawBroken: something changes.
    """
    value, gradient = _value_and_gradient(fn, logits, targets)
    ignored = targets == IGNORED
    if bool((gradient[ignored] != 0).any()):
        raise LawBroken(f"ignored rows: their gradient must be 0, got {gradient[ignored].abs().max().item():.3g}")
    for junk in (float("nan"), float("inf")):
        spoilt = logits.clone()
        spoilt[ignored] = junk
        other, other_gradient = _value_and_gradient(fn, spoilt, targets)
        assert_close(other, value, rtol=1e-12, what=f"ignored rows: loss with {junk} in them")
        assert_close(other_gradient, gradient, rtol=1e-12, what=f"ignored rows: gradient with {junk} in them")


def loss_adds_up(fn: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    """Check that the means of two parts, each times its count of targets, add up to the whole's mean times its count.

    Args:
        fn: the loss to check.
        logits: [N, C] float64.
        targets: [N] integers, with more than one that is not -100.

    Raises:
        LawBroken: they do not.
    """
    counted = targets != IGNORED
    whole = fn(logits, targets) * counted.sum()
    for cut in range(1, len(targets)):
        parts = [(logits[:cut], targets[:cut]), (logits[cut:], targets[cut:])]
        counts = [int((part != IGNORED).sum()) for _, part in parts]
        if all(counts):
            total = torch.stack([fn(*part) * count for part, count in zip(parts, counts, strict=True)]).sum()
            assert_close(total, whole, rtol=1e-10, what=f"sum over splits: {counts[0]} and {counts[1]} targets")


def _loss_couples_rows(fn: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    law, reason = EXEMPTIONS["rows coupled"]
    print(f"not checked: {law}: {reason}")
    try:
        loss_adds_up(fn, logits, targets)
    except (LawBroken, ValueError):  # a part may hold too few rows to be compared
        return
    raise LawBroken(f"{law}: the loss is exempt from this law and keeps it: take the exemption out")


def loss_has_no_order(fn: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    """Check that permuting the rows leaves the value and permutes the gradient.

    Args:
        fn: the loss to check.
        logits: [N, C] float64.
        targets: [N] integers, -100 where a row has none.

    Raises:
        LawBroken: something else changes.
    """
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(1))
    value, gradient = _value_and_gradient(fn, logits, targets)
    other, other_gradient = _value_and_gradient(fn, logits[order], targets[order])
    assert_close(other, value, rtol=1e-10, what="order: loss of permuted rows")
    assert_close(other_gradient, gradient[order], rtol=1e-10, what="order: gradient of permuted rows")


def loss_has_its_gradient(fn: RowsLoss, logits: Tensor, targets: Tensor) -> None:
    """Check that the gradient is the numeric one, and is multiplied by what comes from behind the loss.

    Args:
        fn: the loss to check.
        logits: [N, C] float64.
        targets: [N] integers, -100 where a row has none.

    Raises:
        LawBroken: it is not; gives the first difference torch reports.
    """
    z = logits.detach().clone().requires_grad_()
    try:
        torch.autograd.gradcheck(lambda given: fn(given, targets), z)
    except Exception as error:  # gradcheck's own, or whatever a wrong backward raises
        raise LawBroken(f"gradient: {error}") from error


def _value_and_gradient(fn: RowsLoss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    z = logits.detach().clone().requires_grad_()
    value = fn(z, targets)
    if value.ndim != 0 or not value.requires_grad:
        raise LawBroken(
            f"a loss must be a scalar with a gradient; got shape {[*value.shape]}, requires_grad={value.requires_grad}"
        )
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), gradient
