"""What a fine-tuned model has kept of its base: measures on text that the training was not about.

They stand here, and not beside perplexity in `llmtune.metrics`, since they switch adapters off to get the base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.errors import NonFiniteError
from llmtune.forgetting.base_model import Base, as_base, check_base
from llmtune.forgetting.delta_norms import delta_norms
from llmtune.forgetting.likelihood import Predictions, has_target, predict
from llmtune.losses.chunked import default_chunk_rows
from llmtune.losses.directions import divergence_value
from llmtune.losses.packed import check_documents_apart, is_packed
from llmtune.modules import eval_mode, unwrap
from llmtune.types import Batch


def retention(model: nn.Module, batches: Iterable[Batch], *, base: Base = ()) -> dict[str, float]:
    """Return all measures of this file, and how far the weights have gone, in one pass over held-out text.

    Args:
        model: a model with a language-modelling head, with or without adapters and wrappers; or a classifier.
        batches: dicts with "labels", [B, T] of tokens or [B] of classes (unshifted, -100 ignored), and what the model
            takes beside; packed or padded; read once and moved to the model's device. A batch without a target adds
            nothing.
        base: what the model is compared with: the names of the adapters that stay on in the base, () for the bare
            model; or another module, with the same classes.

    Returns:
        "perplexity", "base_perplexity" and "perplexity_change" (the first minus the second); "kl_to_base" and
        "greedy_agreement"; "delta_norm", and "delta_norm/<layer>" by layer.

    Raises:
        ValueError: there is no target; the base is the model itself, or there is no adapter to switch off; packed
            documents see each other; classes or labels do not fit; or as `delta_norms`.
        NonFiniteError: predictions of a batch are NaN; says which.
        TypeError: `batches` is a single batch, or the base no module and no list of names.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> _ = attach(model, LoRA(rank=4, alpha=8))
        >>> ids = torch.tensor([[5, 7, 11, 13]])
        >>> found = retention(model, [{"input_ids": ids, "labels": ids}])  # before any training
        >>> found["perplexity_change"], found["kl_to_base"], found["greedy_agreement"], found["delta_norm"]
        (0.0, 0.0, 1.0, 0.0)
    """
    sums = _compare(model, batches, base)
    norms = delta_norms(model, base=base)
    return {
        "perplexity": sums.perplexity(),
        "base_perplexity": sums.base_perplexity(),
        "perplexity_change": sums.perplexity_change(),
        "kl_to_base": sums.divergence / sums.targets,
        "greedy_agreement": sums.agreed / sums.targets,
        "delta_norm": math.hypot(*norms.values()),
        **{f"delta_norm/{layer}": norm for layer, norm in norms.items()},
    }


def kl_to_base(model: nn.Module, batches: Iterable[Batch], *, base: Base = ()) -> float:
    """Return KL(base || model) of the predictions, the mean over targets, in nats.

    1/N sum over targets n, sum_v p_n(v) log(p_n(v) / q_n(v)),  p the base's and q the model's distribution at n

    It sees every change of the predictions, also one that leaves the perplexity of these texts as it was. On texts
    drawn from the base it is an unbiased estimate of the divergence of the two models, token by token.

    Args:
        model: as in `retention`.
        batches: as in `retention`, labels [B, T] or [B]: only whether one is -100 matters, not what it is.
        base: as in `retention`.

    Returns:
        0 or more; infinite where the model gives no probability to what the base deems possible.

    Raises:
        ValueError: as `retention`.
        NonFiniteError: predictions of a batch are NaN; says which.
        TypeError: as `retention`.
    """
    sums = _compare(model, batches, base)
    return sums.divergence / sums.targets


def greedy_agreement(model: nn.Module, batches: Iterable[Batch], *, base: Base = ()) -> float:
    """Return at which share of the targets the model's likeliest token is the base's.

    Both read the same text up to the target (they are not let run on by themselves, where one difference changes all
    that follows). Of several equal logits the first counts.

    Args:
        model: as in `retention`.
        batches: as in `retention`, labels [B, T] or [B]: only whether one is -100 matters, not what it is.
        base: as in `retention`.

    Returns:
        0 to 1.

    Raises:
        ValueError: as `retention`.
        NonFiniteError: predictions of a batch are NaN; says which.
        TypeError: as `retention`.
    """
    sums = _compare(model, batches, base)
    return sums.agreed / sums.targets


def perplexity_change(model: nn.Module, batches: Iterable[Batch], *, base: Base = ()) -> float:
    """Return the model's perplexity minus the base's, each exp of the mean negative log-likelihood of a target.

    Args:
        model: as in `retention`.
        batches: as in `retention`, labels [B, T] or [B].
        base: as in `retention`.

    Returns:
        Above 0 where the text has become less likely; infinite where the model's perplexity is too large for a float.

    Raises:
        ValueError: as `retention`.
        NonFiniteError: predictions of a batch are NaN; says which.
        TypeError: as `retention`.
    """
    return _compare(model, batches, base).perplexity_change()


@dataclass
class _Sums:
    """Sums over targets: of divergences, of agreements, and of both models' negative log-likelihoods."""

    targets: int = 0
    divergence: float = 0.0
    agreed: float = 0.0
    loss: float = 0.0
    base_loss: float = 0.0

    def add(self, values: list[float], targets: int) -> None:
        self.targets += targets
        self.divergence += values[0]
        self.agreed += values[1]
        self.loss += values[2]
        self.base_loss += values[3]

    def perplexity(self) -> float:
        return _exp(self.loss / self.targets)

    def base_perplexity(self) -> float:
        return _exp(self.base_loss / self.targets)

    def perplexity_change(self) -> float:
        if self.loss == self.base_loss:
            return 0.0  # also of two that are infinite
        return self.perplexity() - self.base_perplexity()


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def _compare(model: nn.Module, batches: Iterable[Batch], base: Base) -> _Sums:
    if isinstance(batches, Mapping):
        raise TypeError("batches must be a list, or another iterable, of batches; got a single one")
    check_base(model, base)
    inner, sums, tried = unwrap(model), _Sums(), False
    with as_base(model, base) as other:
        where = [next(module.parameters()).device for module in (inner, other)]
    with eval_mode(inner), eval_mode(other):
        for index, batch in enumerate(batches):
            if not has_target(inner, batch):
                continue
            mine, theirs = (_moved(batch, device) for device in where)
            if not tried and is_packed(batch):
                check_documents_apart(inner, mine)
                tried = True
            own = predict(inner, mine)
            with as_base(model, base) as other:
                wanted = predict(other, theirs)
            _check_classes(own, wanted)
            found = _sums_of(own, wanted, model, base)
            if any(math.isnan(value) for value in found):
                raise NonFiniteError(f"predictions of batch {index} (from 0) are NaN: the weights or inputs hold NaN")
            sums.add(found, len(own.labels))
    if sums.targets == 0:
        raise ValueError("there is no target to predict: no batches, or all labels are -100")
    return sums


def _sums_of(own: Predictions, wanted: Predictions, model: nn.Module, base: Base) -> list[float]:
    """Return the four sums of a batch; logits [n, C] of some rows at a time are all that is held of any."""
    size = default_chunk_rows(own.rows.new_empty(_classes(own), 0), buffers=8)
    total = [0.0] * 4
    for rows, base_rows, labels in zip(
        own.rows.split(size), wanted.rows.split(size), own.labels.split(size), strict=True
    ):
        z = own.logits(rows)
        with as_base(model, base):
            z_base = wanted.logits(base_rows).to(z.device)
        log_q, log_p = z.log_softmax(-1), z_base.log_softmax(-1).to(z.dtype)
        parts = (
            divergence_value(log_q, log_p, "forward"),
            (z.argmax(-1) == z_base.argmax(-1)).to(z.dtype),
            F.nll_loss(log_q, labels, reduction="none"),
            F.nll_loss(log_p, labels, reduction="none"),
        )
        sums = torch.stack([part.sum() for part in parts]).tolist()  # one wait for the device
        total = [a + b for a, b in zip(total, sums, strict=True)]
    return total


def _classes(predictions: Predictions) -> int:
    return predictions.rows.shape[1] if predictions.head is None else predictions.head.classes


def _check_classes(own: Predictions, wanted: Predictions) -> None:
    if _classes(own) != _classes(wanted) or len(own.labels) != len(wanted.labels):
        raise ValueError(
            f"the model gives {_classes(own)} classes at {len(own.labels)} places, and the base {_classes(wanted)} at "
            f"{len(wanted.labels)}: they cannot be compared"
        )


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
