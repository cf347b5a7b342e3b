"""What a loss of a row of logits is, for whatever makes a head's logits a few rows at a time."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class RowLoss(Protocol):
    """A loss that is a sum over rows of logits.

    Attributes:
        buffers: how many [rows, V] tensors, the logits among them, `in_place` holds at once.
        takes_few_rows: whether a few rows cost no more than their share of many: nothing is multiplied by a head.
    """

    @property
    def buffers(self) -> int: ...

    @property
    def takes_few_rows(self) -> bool: ...

    def in_place(self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool) -> Tensor:
        """Return the losses [n] of logits z [n, V]; if asked, turn z in place into each row's gradient by its logits.

        Args:
            z: [n, V] logits W h + b in float32 or float64, to be overwritten.
            rows: which rows of all these are.
            tensors: what the loss needs beside the logits, for all rows.
            gradients: whether z must hold the gradient afterwards.
        """
        ...

    def plain(self, z: Tensor, tensors: tuple[Tensor | None, ...]) -> Tensor:
        """Return the losses [N] of all logits z [N, V] by the plain formula, differentiable any number of times."""
        ...


@runtime_checkable
class ColumnLoss(RowLoss, Protocol):
    """A `RowLoss` whose gradient by some of a row's logits needs no more of the others than their log sum exp.

    Both functions are for logits that were in half precision: they may take an exp that is exact to 1e-6.
    """

    def in_place_and_sums(
        self, z: Tensor, rows: slice, tensors: tuple[Tensor | None, ...], gradients: bool
    ) -> tuple[Tensor, Tensor]:
        """Do what `in_place` does; return (losses [n], log sum exp of the finished logits [n])."""
        ...

    def columns_in_place(
        self, z: Tensor, rows: slice, columns: slice, classes: int, tensors: tuple[Tensor | None, ...], sums: Tensor
    ) -> None:
        """Turn logits z [n, c] in place into the gradient by them of each row's loss.

        Args:
            z: [n, c] logits W h + b in float32 or float64, of a few tokens.
            rows: which rows of all these are.
            columns: which of the V tokens these are.
            classes: V.
            tensors: as in `in_place`.
            sums: [N], from `in_place_and_sums`, for all rows.
        """
        ...
