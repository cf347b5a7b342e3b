"""Where a new linear head starts: from the frozen encoder's embeddings of the training rows, instead of at random."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32

IGNORED = -100


@torch.no_grad()
def nearest_mean_head(
    embeddings: Tensor,
    labels: Tensor,
    *,
    distance: Literal["euclidean", "cosine"] = "euclidean",
    temperature: float = 1.0,
    classes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of the linear head that takes the class whose mean embedding is nearest.

    euclidean: weight_c = 2 m_c / t,  bias_c = -||m_c||^2 / t,  so that logits are -||x - m_c||^2 / t + ||x||^2 / t
    cosine:    weight_c = m_c / (||m_c|| s t),  bias_c = 0,     so that logits are cos(x, m_c) / t * ||x|| / s

    m_c is the mean of class c's embeddings, t the temperature, s the mean length of an embedding. What is the same for
    every class, ||x||^2, changes no softmax: the euclidean head's cross-entropy is that of a prototypical network
    (Snell et al. 2017, section 2.4). The cosine head finds the class of the largest cosine exactly; how sure it is goes
    with the length of x, since a linear head cannot divide by it, and is right for embeddings of length s.

    Args:
        embeddings: [N, E] floats, what enters the head in eval mode.
        labels: [N] integers from 0; rows of -100 are left out.
        distance: "euclidean" (squared) or "cosine".
        temperature: above 0; larger is less sure. Squared distances grow with the square of the embeddings' length, and
            with 1.0 the head of long ones is sure of everything; for cosines, 0.05 to 0.1 is usual.
        classes: C; the default is the largest label and one.

    Returns:
        weight [C, E] and bias [C], in at least float32.

    Raises:
        ValueError: shapes do not fit, an option is out of range, a class has no row, or an embedding is not finite.
        TypeError: the labels are no integers.

    Example:
        >>> embeddings = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
        >>> weight, bias = nearest_mean_head(embeddings, torch.tensor([0, 0, 1]))
        >>> torch.tensor([1.0, 2.0]) @ weight.T + bias - 5  # squared distances 1 and 20, and ||x||^2 = 5
        tensor([ -1., -20.])

    Snell et al., "Prototypical Networks for Few-shot Learning" (2017), section 2.4; with a cosine, Gidaris and
    Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting" (2018).
    """
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f'distance must be "euclidean" or "cosine"; got {distance!r}')
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0; got {temperature!r}")
    x, y, C = _labelled(embeddings, labels, classes)
    means = torch.zeros(C, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, y, x)
    means /= torch.bincount(y, minlength=C)[:, None]
    if distance == "euclidean":
        return 2 * means / temperature, -means.square().sum(1) / temperature
    return F.normalize(means, dim=1) / (x.norm(dim=1).mean() * temperature), means.new_zeros(C)


@torch.no_grad()
def linear_probe(
    embeddings: Tensor, labels: Tensor, *, decay: float = 1e-4, classes: int | None = None, max_steps: int = 500
) -> tuple[Tensor, Tensor]:
    """Return (weight, bias) of the linear head that fits frozen embeddings best: multinomial logistic regression.

    argmin over V, b of  mean cross-entropy(x V^T / s + b, labels) + decay / 2 ||V||^2;   weight = V / s

    s is the mean length of an embedding, so that `decay` means the same for any encoder; the bias is free. The minimum
    is unique but for a number added to every bias, which is 0 in sum; it is found by L-BFGS in float64. Nothing is
    drawn at random. With scikit-learn it is `LogisticRegression(C=1 / (decay * N))` on embeddings / s.

    Fine-tuning that starts from this head instead of a random one is LP-FT: a random head's first gradients move the
    encoder's features before the head means anything (Kumar et al. 2022). Train on with a low rate.

    Args:
        embeddings: [N, E] floats, what enters the head in eval mode.
        labels: [N] integers from 0; rows of -100 are left out.
        decay: above 0. Rows that a plane can separate have no best head without it.
        classes: C; the default is the largest label and one.
        max_steps: of L-BFGS, at most.

    Returns:
        weight [C, E] and bias [C], in at least float32.

    Raises:
        ValueError: shapes do not fit, an option is out of range, a class has no row, or an embedding is not finite.
        TypeError: the labels are no integers.

    Example:
        >>> embeddings = torch.tensor([[2.0, 1.0], [3.0, 0.0], [-2.0, 1.0]])
        >>> weight, bias = linear_probe(embeddings, torch.tensor([0, 0, 1]))
        >>> (embeddings @ weight.T + bias).argmax(1)
        tensor([0, 0, 1])

    Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution" (2022), section
    3.4.
    """
    if not 0 < decay < float("inf"):
        raise ValueError(f"decay must be above 0; got {decay!r}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be 1 or more; got {max_steps!r}")
    x, y, C = _labelled(embeddings, labels, classes)
    kept, length = x.dtype, x.double().norm(dim=1).mean().clamp(min=1e-300)
    z = x.double() / length
    both = torch.zeros(C, z.shape[1] + 1, dtype=torch.float64, device=z.device, requires_grad=True)  # V and b
    optimizer = torch.optim.LBFGS(
        [both], max_iter=max_steps, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            weight, bias = both[:, :-1], both[:, -1]
            loss = F.cross_entropy(z @ weight.T + bias, y) + decay / 2 * weight.square().sum()
            loss.backward()
        return loss.detach()

    optimizer.step(closure)
    found = both.detach()
    return (found[:, :-1] / length).to(kept), found[:, -1].to(kept)


def _labelled(embeddings: Tensor, labels: Tensor, classes: int | None) -> tuple[Tensor, Tensor, int]:
    """Return (the rows with a label [n, E] in at least float32, their labels [n], C), checked."""
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"expected embeddings [N, E] and labels [N]; got {[*embeddings.shape]} and {[*labels.shape]}")
    if labels.is_floating_point() or labels.dtype == torch.bool or not embeddings.is_floating_point():
        raise TypeError(f"expected embeddings of floats and labels of integers; got {embeddings.dtype}, {labels.dtype}")
    rows = (labels != IGNORED).nonzero().squeeze(1)
    x, y = at_least_float32(embeddings.index_select(0, rows)), labels.index_select(0, rows).long()
    if len(y) == 0:
        raise ValueError(f"a head needs at least one row with a label: all {len(labels)} are {IGNORED}, or none came")
    if not bool(x.isfinite().all()):
        raise ValueError("an embedding is not finite (NaN or infinite): look at what the encoder gives")
    C = int(y.max()) + 1 if classes is None else classes
    if int(y.min()) < 0 or int(y.max()) >= C:
        raise ValueError(f"labels must be from 0 to {C - 1}, or {IGNORED}; got {int(y.min())} to {int(y.max())}")
    empty = (torch.bincount(y, minlength=C) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"every class needs a row to start its head from, and these have none: {empty[:5]}")
    return x, y, C
