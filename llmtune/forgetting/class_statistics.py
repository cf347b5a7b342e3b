"""A linear head out of sums over each class: it learns class after class, forgets none, and keeps no example."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmtune.errors import check_state
from llmtune.forgetting.likelihood import IGNORED

NEVER = -1e4  # how far a class without a row stays below the smallest logit that a chosen class can have


class ClassStatistics:
    """What linear discriminant analysis needs of the rows that have come: the head is the same in whatever order.

    n_c, the rows of class c; s_c, the sum of their embeddings; and M, the sum of x x^T over all rows, in float64:

        m_c = s_c / n_c,    S = (M - sum_c n_c m_c m_c^T) / N,    S' = (1 - shrinkage) S + shrinkage tr(S) / E * I
        weight_c = S'^-1 (m_c - m),    bias_c = -1/2 (m_c + m)^T S'^-1 (m_c - m)  (+ log n_c / N with `prior`)

    which is the most probable class where every class is a Gaussian with covariance S'. With a shrinkage of 1 it is the
    class whose mean is nearest. m, the mean of all rows, changes no softmax; without it what all embeddings share would
    be most of every logit, and the differences be lost in half precision.

    The encoder must not change from the first row to the last: an embedding that came of other weights does not fit.

    Args:
        classes: C, of all tasks.
        width: E, the length of an embedding.

    Attributes:
        counts: [C], rows of each class so far.
        sums: [C, E].
        moment: [E, E].

    Raises:
        ValueError: fewer than two classes, or no width; or one of them is no whole number.

    Example:
        >>> statistics = ClassStatistics(classes=3, width=2)
        >>> statistics.add(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0, 1, 1]))
        >>> weight, bias = statistics.head()
        >>> (torch.tensor([[3.0, 0.0], [0.0, 3.0]]) @ weight.T + bias).argmax(1)
        tensor([0, 1])

    Where we differ: the public code of streaming discriminant analysis updates its covariance by a running formula, one
    row at a time, so that it depends on the order by rounding and takes a step a row; here any number of rows is one
    product. The paper's head has no m.

    Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis" (2020), section 3;
    the shrinkage towards the mean variance as in Ledoit and Wolf, "A well-conditioned estimator for large-dimensional
    covariance matrices" (2004), though its size is the caller's.
    """

    def __init__(self, classes: int, width: int) -> None:
        whole = isinstance(classes, int) and isinstance(width, int)
        if not whole or classes < 2 or width < 1:
            raise ValueError(f"a head needs two classes or more and a width; got {classes!r} classes, width {width!r}")
        self.counts = torch.zeros(classes, dtype=torch.long)
        self.sums = torch.zeros(classes, width, dtype=torch.float64)
        self.moment = torch.zeros(width, width, dtype=torch.float64)

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add rows.

        Args:
            embeddings: [N, E] floats, what enters the head in eval mode.
            labels: [N] integers from 0 to C - 1; rows of -100 are left out.

        Raises:
            ValueError: a shape does not fit, a label is out of range, or an embedding is not finite; nothing is added.
            TypeError: the labels are no integers, or the embeddings no floats.
        """
        C, E = self.sums.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != E or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"expected embeddings [N, {E}] and labels [N]; got {[*embeddings.shape]} and {[*labels.shape]}"
            )
        if not embeddings.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(
                f"expected embeddings of floats and labels of integers; got {embeddings.dtype}, {labels.dtype}"
            )
        y = labels.detach().cpu().long()
        x = embeddings.detach().cpu().double()[y != IGNORED]
        y = y[y != IGNORED]
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= C):
            raise ValueError(f"labels must be from 0 to {C - 1}, or {IGNORED}; got {int(y.min())} to {int(y.max())}")
        if not bool(x.isfinite().all()):
            raise ValueError("an embedding is not finite (NaN or infinite): look at what the encoder gives")
        self.counts += torch.bincount(y, minlength=C)
        self.sums.index_add_(0, y, x)
        self.moment.addmm_(x.T, x)

    def head(self, *, shrinkage: float = 0.1, prior: bool = False) -> tuple[Tensor, Tensor]:
        """Return (weight [C, E], bias [C]) in float32; a class without a row is never chosen, whatever the embedding.

        Such a class has a weight of 0 and a bias of 2 l - 1e4. l, 0 or less, is the mean over rows of their class's
        bias. It is what no embedding's largest logit is below, since the weights have a mean of 0 over rows.

        Args:
            shrinkage: above 0 and at most 1, how much of the covariance is replaced by its mean variance.
            prior: count on the classes being as frequent as in the rows; else all are as probable.

        Raises:
            ValueError: the shrinkage is out of range, or no class has a row.
        """
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage must be above 0 and at most 1; got {shrinkage!r}")
        there = self.counts > 0
        if not bool(there.any()):
            raise ValueError(f"a head needs rows with labels, and none of {len(there)} classes has one: add some")
        share = (self.counts[there] / self.counts.sum()).double()
        means, middle = self.sums[there] / self.counts[there, None], self.sums.sum(0) / self.counts.sum()
        within = (self.moment - self.sums[there].T @ means) / self.counts.sum()
        within = (within + within.T) / 2
        level = within.trace().clamp(min=0) / len(within)
        if float(level) <= 1e-12 * float(means.square().mean()):  # one row a class, or all alike: nearest mean
            shrinkage, level = 1.0, torch.ones_like(level)
        eye = torch.eye(len(within), dtype=torch.float64)
        found = torch.linalg.solve((1 - shrinkage) * within + shrinkage * level * eye, (means - middle).T).T
        apart = -(found * (means + middle)).sum(1) / 2 + (share.log() if prior else 0)
        weight, bias = torch.zeros_like(self.sums), torch.full((len(there),), NEVER, dtype=torch.float64)
        bias += 2 * (share * apart).sum()  # once would do, but for the rounding of a head in half precision
        weight[there], bias[there] = found, apart
        return weight.float(), bias.float()

    def state_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return {"counts": self.counts.clone(), "sums": self.sums.clone(), "moment": self.moment.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back.

        Raises:
            ValueError: they are of other classes or another width.
        """
        check_state(state, ("counts", "sums", "moment"), "ClassStatistics")
        own = self.state_dict()
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(f"{name} must be {[*tensor.shape]}; the saved one is {[*state[name].shape]}")
        self.counts, self.sums, self.moment = (state[name].to(own[name]).clone() for name in own)
