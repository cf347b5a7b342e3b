"""Contrastive losses: embeddings of one class together, those of others apart; a row is compared with its batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.losses.chunked import at_least_float32
from llmtune.losses.rows import Reduction, check_reduction, check_temperature, is_integer, reduced
from llmtune.types import Batch

Distance = Literal["euclidean", "cosine"]
IGNORED = -100


def supervised_contrastive_loss(
    embeddings: Tensor, labels: Tensor, *, temperature: float = 0.1, reduction: Reduction = "mean"
) -> Tensor:
    """Return the supervised contrastive loss: each row's classmates shall be nearer to it than all other rows.

    loss of i = -1 / |P(i)| sum over p in P(i) of log( exp(z_i z_p / t) / sum over a != i of exp(z_i z_a / t) )

    z are the embeddings at length 1, t the temperature, P(i) the other rows of i's class. This is the form with the sum
    outside the logarithm (Khosla et al. 2020, equation 2).

    Rows couple: what a row costs depends on which others are there, so the loss of a batch is not that of its parts.

    Where we differ: a row without a classmate has no loss; it serves the others as a negative and is left out of the
    mean. The authors' program divides by its 0 classmates and gives NaN, expects embeddings that are at length 1
    already, and multiplies by temperature / base_temperature, so that another temperature is another learning rate too.
    The paper's sum over rows is a mean, as in that program.

    Args:
        embeddings: [N, E] floats.
        labels: [N] integers, the classes; rows of -100 are left out altogether, even as negatives.
        temperature: larger than 0.
        reduction: "mean" over the rows that have a classmate, "sum", or "none": [N], with 0 where there is none.

    Returns:
        A scalar, or [N] for "none"; in at least float32, also under autocast; 0 or more.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or no row has a classmate and the mean is asked for.
        TypeError: the labels are no integers.

    Example:
        >>> apart = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
        >>> bool(supervised_contrastive_loss(apart, torch.tensor([0, 0, 1, 1])) < 0.001)
        True
        >>> bool(supervised_contrastive_loss(apart, torch.tensor([0, 1, 0, 1])) > 9)
        True
    """
    labels = _class_labels("embeddings", embeddings, labels)
    _check_options(temperature, reduction)
    labelled, anchors = (labels != IGNORED).nonzero().squeeze(1), has_classmate(labels).nonzero().squeeze(1)
    if reduction == "mean" and len(anchors) == 0:
        raise ValueError(
            f"the mean needs two rows of one class: none of the {len(labelled)} labelled rows (of {len(labels)}) has a "
            "classmate. Take larger batches, or batches with several rows of a class"
        )
    itself = anchors[:, None] == labelled
    classmates = (labels[anchors, None] == labels[labelled]) & ~itself
    z = similarities(embeddings.index_select(0, anchors), embeddings.index_select(0, labelled)) / temperature
    log_p = z - z.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    losses = -torch.where(classmates, log_p, 0.0).sum(1) / classmates.sum(1)
    return reduced(losses, anchors, labels.shape, reduction)


def info_nce_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    temperature: float = 0.05,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the loss of picking each query's own key among all keys of the batch, by cosine.

    loss of i = -log( exp(cos(q_i, k_i) / t) / sum over j of exp(cos(q_i, k_j) / t) )

    This is InfoNCE (van den Oord et al. 2018, equation 4) with the batch's other keys as negatives, the "multiple
    negatives ranking" of sentence-transformers, whose `scale` is 1 / temperature. Rows couple, as above.

    Where we differ: that loss takes a key that two queries share for a negative of both; with `ids`, keys equal to a
    query's own are left out of its negatives.

    Args:
        queries: [N, E] floats.
        keys: [M, E], M >= N: key i is the right one for query i, those from N on are further negatives for all.
        temperature: larger than 0.
        ids: [M] integers that say which keys are the same; left out, all differ.
        reduction: "mean" over queries, "sum", or "none": [N].

    Returns:
        A scalar, or [N] for "none"; in at least float32, also under autocast; 0 or more.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or there are fewer than two keys, so that nothing is
            to be picked.

    Example:
        >>> rows = torch.eye(3)
        >>> bool(info_nce_loss(rows, rows) < 1e-6), bool(info_nce_loss(rows, rows.roll(1, 0)) > 19)
        (True, True)
    """
    _check_options(temperature, reduction)
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1] or not 0 < len(queries) <= len(keys):
        raise ValueError(
            f"expected queries [N, E] and keys [M, E] with 0 < N <= M; got {[*queries.shape]} and {[*keys.shape]}"
        )
    if len(keys) < 2:
        raise ValueError("one key leaves nothing to pick from, and the loss would be 0: give two pairs or more")
    N, M = len(queries), len(keys)
    z = similarities(queries, keys) / temperature
    own = torch.eye(N, M, dtype=torch.bool, device=z.device)
    if ids is not None:
        if ids.shape != (M,):
            raise ValueError(f"expected ids [{M}], one for each key; got {[*ids.shape]}")
        z = z.masked_fill((ids[:N, None] == ids) & ~own, -torch.inf)
    losses = z.logsumexp(1) - z.diagonal()
    return reduced(losses, None, losses.shape, reduction)


def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    distance: Distance = "euclidean",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return the cross-entropy of telling a query's class by how near it is to each class's mean of examples.

    loss of q = -log( exp(-d(q, c_y) / t) / sum over classes k of exp(-d(q, c_k) / t) ), c_k = mean of k's support

    d is the squared Euclidean distance (Snell et al. 2017, equations 1 and 2), for which the mean is the right
    prototype, or with "cosine" 1 - cos(q, c_k), which lies between 0 and 2, so that t = 1 cannot tell classes apart
    sharply: take 0.1 or so. The classes are those of the support, whatever their numbers.

    Where we differ: easyfsl takes the distance itself where the paper takes its square, and needs classes numbered 0,
    1, 2 ...; a number left out there gives a prototype of NaN.

    Args:
        support: [n, E] floats, the examples.
        support_labels: [n] integers, their classes; rows of -100 are left out.
        queries: [m, E].
        query_labels: [m] integers; rows of -100 are left out.
        distance: "euclidean" (squared) or "cosine".
        temperature: larger than 0; the paper's is 1.
        reduction: "mean" over the queries with a label, "sum", or "none": [m], with 0 where there is none.

    Returns:
        A scalar, or [m] for "none"; in at least float32, also under autocast; 0 or more.

    Raises:
        ValueError: shapes do not fit, an option is out of range, the support has fewer than two classes, a query's
            class is not among them, or no query has a label and the mean is asked for.
        TypeError: labels are no integers.

    Example:
        >>> support = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 0.0]])
        >>> query = torch.tensor([[1.0, 2.0]])  # squared distances 1 and 20
        >>> loss = prototypical_loss(support, torch.tensor([4, 4, 9]), query, torch.tensor([4]))
        >>> torch.allclose(loss, torch.tensor(-19.0).exp().log1p())
        True
    """
    support_labels = _class_labels("support", support, support_labels)
    query_labels = _class_labels("queries", queries, query_labels)
    _check_options(temperature, reduction)
    check_distance(distance)
    if support.shape[1] != queries.shape[1]:
        raise ValueError(f"support and queries need one width E; got {[*support.shape]} and {[*queries.shape]}")
    classes, prototypes, _ = prototypes_of(support, support_labels)
    rows = (query_labels != IGNORED).nonzero().squeeze(1)
    if reduction == "mean" and len(rows) == 0:
        raise ValueError(f"the mean needs at least one query: all {len(queries)} are ignored (labels all {IGNORED})")
    asked, wanted = at_least_float32(queries.index_select(0, rows)), query_labels.index_select(0, rows)
    targets = torch.searchsorted(classes, wanted).clamp(max=len(classes) - 1)
    strange = classes[targets] != wanted
    if bool(strange.any()):
        raise ValueError(
            f"class {int(wanted[strange][0])} of a query has no example in the support, whose classes are "
            f"{classes.tolist()}"
        )
    z = nearness(asked, prototypes, distance) / temperature
    losses = F.cross_entropy(z, targets, reduction="none")
    return reduced(losses, rows, query_labels.shape, reduction)


def has_classmate(labels: Tensor) -> Tensor:
    """Return [N] booleans: whether another row has the same label; labels [N] integers, a row of -100 has none."""
    return ((labels[:, None] == labels).sum(1) > 1) & (labels != IGNORED)


def row_classes(batch: Batch) -> Tensor:
    """Return a batch's "labels" [B] in int64.

    Raises:
        ValueError: they are missing, or no integers, one a row.
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 1 and is_integer(labels):
        return labels.long()
    came = f"{labels.dtype} {[*labels.shape]}" if isinstance(labels, Tensor) else repr(labels)
    raise ValueError(f'the loss needs integer "labels" [B] in the batch, one class a row; got {came}')


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosines [n, m] of rows [n, E] and rows [m, E], in at least float32, also under autocast."""
    a, b = F.normalize(at_least_float32(a), dim=1), F.normalize(at_least_float32(b), dim=1)
    wide = torch.promote_types(a.dtype, b.dtype)
    with torch.autocast(a.device.type, enabled=False):
        return a.to(wide) @ b.to(wide).T


def prototypes_of(support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (classes [C] ascending, the means [C, E] of their rows, how many [C]) of support [n, E], labels [n].

    Raises:
        ValueError: there are fewer than two classes.
    """
    rows = (labels != IGNORED).nonzero().squeeze(1)
    kept = at_least_float32(support.index_select(0, rows))
    classes, place, counts = labels.index_select(0, rows).unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(
            f"the support needs examples of two classes or more, or there is nothing to tell apart; got classes "
            f"{classes.tolist()}"
        )
    means = kept.new_zeros(len(classes), kept.shape[1]).index_add(0, place, kept) / counts[:, None]
    return classes, means, counts


def nearness(queries: Tensor, prototypes: Tensor, distance: Distance) -> Tensor:
    """Return minus the distances [m, C] of queries [m, E] and prototypes [C, E]: the squared, or 1 - cosine."""
    if distance == "euclidean":
        return -(queries[:, None] - prototypes).square().sum(-1)
    return similarities(queries, prototypes) - 1


def _class_labels(name: str, rows: Tensor, labels: Tensor) -> Tensor:
    """Return the labels [N] in int64; raise where they are no integers, one for each row [N, E]."""
    if rows.ndim != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(f"expected {name} [N, E] and their labels [N]; got {[*rows.shape]} and {[*labels.shape]}")
    if not is_integer(labels):
        raise TypeError(f"the labels of {name} must be integers, one class each; got {labels.dtype}")
    return labels.long()


def check_distance(distance: str) -> None:
    """Raise ValueError where a distance is not known."""
    if distance not in ("euclidean", "cosine"):
        raise ValueError(f'distance must be "euclidean" or "cosine"; got {distance!r}')


def _check_options(temperature: float, reduction: str) -> None:
    check_temperature(temperature)
    check_reduction(reduction)
