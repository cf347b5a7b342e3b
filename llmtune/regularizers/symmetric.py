"""The Kullback-Leibler divergence taken both ways: how far two predictions are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtune.losses.chunked import at_least_float32


def symmetric_kl(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Return KL(a || b) + KL(b || a) of the softmax of two sets of logits, row by row.

        sum_v (p_v - q_v) (log p_v - log q_v)

    0 or more, and 0 where the two agree; there the gradient is exactly 0 as well, since both factors are. Gradients
    flow to both sides.

    Args:
        logits_a: [..., V].
        logits_b: [..., V].

    Returns:
        [...], in at least float32.

    Raises:
        ValueError: the shapes differ.

    Where we differ: the `stable_kl` of SMART's authors (mt-dnn) is 2 sum p (logit p - logit q), which is no divergence
    (it takes the log-odds of each class for its log-probability) and gives no gradient to q nor through the logarithms.

    Example:
        >>> symmetric_kl(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).item()
        0.0
    """
    if logits_a.ndim < 1 or logits_a.shape != logits_b.shape:
        raise ValueError(f"both logits need one shape [..., V]; got {[*logits_a.shape]} and {[*logits_b.shape]}")
    log_p, log_q = (at_least_float32(logits).log_softmax(-1) for logits in (logits_a, logits_b))
    p, q = log_p.exp(), log_q.exp()
    ratio = torch.where((p == 0) & (q == 0), 0.0, log_p - log_q)  # 0 log 0 = 0, for logits of -inf
    return ((p - q) * ratio).sum(-1)
