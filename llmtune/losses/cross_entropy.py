"""Cross-entropy of a linear head, computed only for the rows that carry a label and without ever holding all logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.chunked import linear_row_loss
from llmtune.losses.rows import Reduction, check_reduction, labelled_rows, reduced

LOG2_E = math.log2(math.e)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
) -> Tensor:
    """Return the cross-entropy of z = softcap(logit_scale * (hidden @ weight.T + bias)) with the targets.

    A row's loss is (1 - e) (lse - z_target) + e (lse - mean z) + z_loss * lse^2, with lse = log sum exp z and e the
    label smoothing: `F.cross_entropy(F.linear(hidden, weight, bias), targets)` with its options and more. It never
    holds the [N, V] logits: only rows that carry a label are computed, `chunk_rows` at a time, and their gradient is
    formed in the same pass. What stands in the other rows, NaN included, changes nothing. The z-loss is that of PaLM
    (Chowdhery et al. 2022, section 5), which has log^2 Z with factor 1e-4.

    Args:
        hidden: [N, E] floats. With bfloat16 or float16 the products run in that type, softmax and loss in float32.
        weight: [V, E].
        targets: [N] integers in 0 ... V - 1, or `ignore_index`.
        bias: [V], or None.
        ignore_index: the target of a row that carries no label.
        label_smoothing: share of every target spread evenly over the vocabulary, 0 to 1.
        z_loss: factor of lse^2, 0 or more.
        softcap: bounds the logits to softcap * tanh(logits / softcap); None for none.
        logit_scale: factor on the logits, before the soft cap.
        reduction: "mean" over the rows with a label, "sum", or "none": [N], with 0 where there is no label.
        chunk_rows: rows of logits held at once. Left out, as many as fit into 64 MB on a CPU (512 MB on an
            accelerator), but at least 64.

    Returns:
        A scalar, or [N] for "none"; float32, or float64 for float64 input. Gradients flow to hidden, weight and bias,
        for those that ask for one; a second derivative is computed through the plain formula, which builds the logits.

    Raises:
        ValueError: a shape, a target or an option is out of range, or no row carries a label and the mean is asked for.
        TypeError: the targets are no integers.

    Example:
        >>> hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
        >>> targets = torch.tensor([1, -100, 6, 0, -100])
        >>> loss = linear_cross_entropy(hidden, weight, targets)
        >>> torch.allclose(loss, F.cross_entropy(hidden @ weight.T, targets))
        True
    """
    check_linear_shapes(hidden, weight, bias)
    N, V = len(hidden), len(weight)
    if targets.shape != (N,):
        raise ValueError(f"expected targets [{N}], one for each row of hidden; got {tuple(targets.shape)}")
    check_reduction(reduction)
    loss = CrossEntropy(label_smoothing, z_loss, softcap, logit_scale)
    rows = labelled_rows(targets, V, ignore_index=ignore_index)
    if rows is not None:
        hidden, targets = hidden.index_select(0, rows), targets.index_select(0, rows)
    if len(targets) == 0 and reduction == "mean":
        raise ValueError(f"the mean needs at least one target: all {N} are ignored (labels all {ignore_index})")
    per_row, factor = reduction == "none", 1 / len(targets) if reduction == "mean" else 1.0
    value = linear_row_loss(
        hidden, weight, bias, loss, (targets,), per_row=per_row, factor=factor, chunk_rows=chunk_rows
    )
    return reduced(value, rows, torch.Size((N,)), "none") if per_row else value


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of one row of logits, with its options as in `linear_cross_entropy`; a `RowLoss`.

    Its one tensor beside the logits are the targets [N], none of them ignored.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be between 0 and 1; got {self.label_smoothing}")
        if not (self.z_loss >= 0.0 and math.isfinite(self.z_loss)):
            raise ValueError(f"z_loss must be a finite number, 0 or more; got {self.z_loss}")
        check_after_head(self.softcap, self.logit_scale)

    def after_head(self, softcap: float | None, logit_scale: float) -> CrossEntropy:
        """Return the same for logits that are scaled and capped first."""
        return replace(self, softcap=softcap, logit_scale=logit_scale)

    @property
    def takes_few_rows(self) -> bool:
        return True

    @property
    def buffers(self) -> int:
        return 1 if self.softcap is None else 2

    def in_place(self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool) -> Tensor:
        """Return the losses [n] and turn the logits z [n, V] into their gradient; see `RowLoss`."""
        return self._in_place(z, rows, tensors, gradients, torch.exp_)[0]

    def in_place_and_sums(
        self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool
    ) -> tuple[Tensor, Tensor]:
        """Return also each row's log sum exp [n]; see `ColumnLoss`."""
        return self._in_place(z, rows, tensors, gradients, _fast_exp_)

    def _in_place(
        self,
        z: Tensor,
        rows: slice,
        tensors: tuple[Tensor | None, ...],
        gradients: bool,
        exp_: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        (targets,) = tensors
        assert targets is not None
        index, smooth = targets[rows, None].long(), self.label_smoothing
        slope = scale_and_cap_(z, self.logit_scale, self.softcap, slope=gradients)
        target_logit = z.gather(1, index).squeeze(1)
        mean_logit = z.mean(1) if smooth else 0.0
        highest = z.amax(1, keepdim=True)
        total = exp_(z.sub_(highest)).sum(1)
        lse = total.log() + highest.squeeze(1)
        loss = lse - (1 - smooth) * target_logit - smooth * mean_logit + self.z_loss * lse.square()
        if gradients:
            z *= ((1 + 2 * self.z_loss * lse) / total)[:, None]
            z.scatter_add_(1, index, z.new_full(index.shape, smooth - 1))
            self._gradient_before_finish(z, slope, z.shape[1])
        return loss, lse

    def columns_in_place(
        self, z: Tensor, rows: slice, columns: slice, classes: int, tensors: tuple[Tensor | None, ...], sums: Tensor
    ) -> None:
        """Turn some tokens' logits z [n, c] into their gradient; see `ColumnLoss`."""
        (targets,) = tensors
        assert targets is not None
        slope, lse = scale_and_cap_(z, self.logit_scale, self.softcap, slope=True), sums[rows, None]
        _fast_exp_(z.sub_(lse))
        if self.z_loss:
            z *= 1 + 2 * self.z_loss * lse
        index = targets[rows, None].long() - columns.start
        here = (index >= 0) & (index < z.shape[1])
        z.scatter_add_(1, index * here, (self.label_smoothing - 1) * here.to(z.dtype))
        self._gradient_before_finish(z, slope, classes)

    def _gradient_before_finish(self, z: Tensor, slope: Tensor | None, classes: int) -> None:
        """Turn p - target in z into the gradient by the logits as the head gave them, in place."""
        if self.label_smoothing:
            z -= self.label_smoothing / classes
        if slope is not None:
            z *= slope
        if self.logit_scale != 1.0:
            z *= self.logit_scale

    def plain(self, z: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Return the losses [N] of logits z [N, V] by torch's own functions; see `RowLoss`."""
        (targets,) = tensors
        assert targets is not None
        z = scaled_and_capped(z, self.logit_scale, self.softcap)
        loss = F.cross_entropy(z, targets.long(), reduction="none", label_smoothing=self.label_smoothing)
        return loss + self.z_loss * z.logsumexp(-1).square() if self.z_loss else loss


def _fast_exp_(z: Tensor) -> Tensor:
    """Turn z in place into exp(z), to 1e-7 of it and |z| times 6e-8. On a CPU exp2 is the cheaper."""
    return z.mul_(LOG2_E).exp2_()


def scaled_and_capped(z: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logit_scale * z / softcap), or logit_scale * z without a soft cap."""
    z = z if logit_scale == 1.0 else z * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def scale_and_cap_(z: Tensor, logit_scale: float, softcap: float | None, *, slope: bool) -> Tensor | None:
    """Do what `scaled_and_capped` does in place; return the soft cap's slope where that is asked for, else None."""
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    found = 1 - z.square() if slope else None
    z *= softcap
    return found


def check_after_head(softcap: float | None, logit_scale: float) -> None:
    """Raise ValueError where the soft cap is neither None nor finite and above 0, or the scale is 0 or not finite."""
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be finite and larger than 0, or None; got {softcap}")
    if not (math.isfinite(logit_scale) and logit_scale != 0.0):
        raise ValueError(f"logit_scale must be a finite number other than 0; got {logit_scale}")


def check_linear_shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where hidden [N, E], weight [V, E] and bias [V] do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [N, E] and weight [V, E]; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias [{len(weight)}]; got {tuple(bias.shape)}")
