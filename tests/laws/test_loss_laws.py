"""The table of losses, each held to the laws of its family; and a seeded fault for every law."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.errors import LawBroken
from llmtune.forgetting.dark_replay import DERLoss
from llmtune.forgetting.distill_from_cache import DistillFromCache
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.losses.causal_lm import CausalLMLoss
from llmtune.losses.classification import ClassificationLoss
from llmtune.losses.confidence import ConfidencePenaltyLoss, confidence_penalty
from llmtune.losses.contrastive import info_nce_loss, prototypical_loss, supervised_contrastive_loss
from llmtune.losses.cross_entropy import linear_cross_entropy
from llmtune.losses.divergence import kl_divergence, linear_kl_divergence
from llmtune.losses.features import FeatureDistillationLoss, feature_distillation_loss
from llmtune.losses.focal import FocalLoss, focal_loss
from llmtune.losses.masked_lm import MaskedLMLoss
from llmtune.losses.own_classes import OwnClassesLoss, own_classes_cross_entropy
from llmtune.losses.preference import DPOLoss, dpo_loss
from llmtune.losses.prototypical import PrototypicalLoss
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss
from llmtune.losses.supervised_contrastive import SupervisedContrastiveLoss
from llmtune.losses.top_k import top_k_kl_divergence, top_k_log_probabilities
from llmtune.regularizers.rdrop import RDropLoss, r_drop_loss
from llmtune.testing.losses import (
    check_loss,
    loss_adds_up,
    loss_equals_reference,
    loss_has_its_gradient,
    loss_has_no_order,
    loss_ignores_rows,
    loss_inputs,
)
from llmtune.types import LossFunction

C = 7
MIX = torch.randn(C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SHIFT = torch.randn(C, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
TEACHER = 2 * torch.randn(C, C, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def plain_cross_entropy(
    z: Tensor, t: Tensor, *, e: float = 0.0, zl: float = 0.0, cap: float | None = None, scale: float = 1.0
) -> Tensor:
    """The formula itself, written out."""
    z, t = z[t != -100] * scale, t[t != -100]
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    lse = torch.log(torch.exp(z).sum(1))
    target = z[torch.arange(len(t)), t]
    return ((1 - e) * (lse - target) + e * (lse - z.mean(1)) + zl * lse**2).mean()


def through_head(z: Tensor, t: Tensor, *, reduction: str = "mean", **options: float) -> Tensor:
    """Our loss of the logits MIX z + SHIFT."""
    value = linear_cross_entropy(z, MIX, t, bias=SHIFT, chunk_rows=2, reduction=reduction, **options)
    return value if reduction == "mean" else value.sum() / (t != -100).sum()


def plain_through_head(z: Tensor, t: Tensor, **options: float) -> Tensor:
    return plain_cross_entropy(z @ MIX.T + SHIFT, t, **options)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * torch.log(p / q)).sum(-1).mean()


def plain_kl(z: Tensor, t: Tensor, *, temperature: float = 1.0, direction: str = "forward") -> Tensor:
    s = torch.softmax(z[t != -100] / temperature, -1)
    p = torch.softmax(TEACHER[t[t != -100]] / temperature, -1)
    m = (s + p) / 2
    values = {
        "forward": kl(p, s),
        "reverse": kl(s, p),
        "symmetric": (kl(p, s) + kl(s, p)) / 2,
        "jensen-shannon": (kl(p, m) + kl(s, m)) / 2,
    }
    return temperature**2 * values[direction]


def plain_top_k(z: Tensor, t: Tensor, *, k: int, temperature: float = 1.0, tail: bool = True) -> Tensor:
    """Class by class: the top k, and all others added up; or the top k alone, both sides made to sum to 1."""
    s = torch.softmax(z[t != -100] / temperature, -1)
    p = torch.softmax(TEACHER[t[t != -100]] / temperature, -1)
    order = p.argsort(-1, descending=True)
    s, p = s.gather(-1, order), p.gather(-1, order)
    if tail:
        s, p = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (s, p))
    else:
        s, p = (x[:, :k] / x[:, :k].sum(-1, keepdim=True) for x in (s, p))
    return temperature**2 * kl(p, s)


def of_top_k(z: Tensor, t: Tensor, *, k: int, temperature: float = 1.0, **options: object) -> Tensor:
    stored = top_k_log_probabilities(TEACHER[t.clamp(min=0)], k, temperature=temperature)
    return top_k_kl_divergence(z, *stored, temperature=temperature, mask=t != -100, **options)


def plain_focal(z: Tensor, t: Tensor, *, gamma: float, weights: Tensor | None = None) -> Tensor:
    z, t = z[t != -100], t[t != -100]
    p = (torch.exp(z) / torch.exp(z).sum(1, keepdim=True))[torch.arange(len(t)), t]
    w = 1.0 if weights is None else weights[t]
    return (-w * (1 - p) ** gamma * torch.log(p)).mean()


def plain_own_classes(z: Tensor, t: Tensor, *, own: tuple[int, ...]) -> Tensor:
    """Row by row: among the own classes, or among all."""
    losses = []
    for row, target in zip(z[t != -100], t[t != -100].tolist(), strict=True):
        among = own if target in own else range(C)
        losses.append(torch.log(sum(torch.exp(row[c]) for c in among)) - row[target])
    return sum(losses) / len(losses)


def plain_entropy(z: Tensor) -> Tensor:
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    return -(p * torch.log(p)).sum(-1)


def plain_confident(z: Tensor, t: Tensor, *, threshold: float | None = None, **options: float) -> Tensor:
    """0.3 times what confidence costs, and the cross-entropy."""
    done = z * options.get("scale", 1.0)
    if "cap" in options:
        done = options["cap"] * torch.tanh(done / options["cap"])
    entropy = plain_entropy(done[t != -100])
    cost = -entropy if threshold is None else torch.relu(threshold - entropy)
    return plain_cross_entropy(z, t, **options) + 0.3 * cost.mean()


def plain_features(z: Tensor, t: Tensor, *, kind: str = "mse", projection: Tensor | None = None) -> Tensor:
    s, wanted = z[t != -100], TEACHER[t[t != -100]]
    s = s if projection is None else s @ projection.T
    if kind == "mse":
        return ((s - wanted) ** 2).mean()
    return (1 - (s * wanted).sum(-1) / ((s**2).sum(-1) * (wanted**2).sum(-1)).sqrt()).mean()


def of_features(z: Tensor, t: Tensor, **options: object) -> Tensor:
    return feature_distillation_loss(z, TEACHER[t.clamp(min=0)], mask=t != -100, **options)


def of_logits(z: Tensor, t: Tensor, **options: object) -> Tensor:
    return kl_divergence(z, TEACHER[t.clamp(min=0)], mask=t != -100, **options)


def of_heads(z: Tensor, t: Tensor, **options: object) -> Tensor:
    eye = torch.eye(C, dtype=z.dtype)
    teacher = TEACHER[t.clamp(min=0)]
    return linear_kl_divergence(z, eye, teacher, eye, mask=t != -100, chunk_rows=2, **options)


class RowsModel(nn.Module):
    """A language model whose logits are its input, so that a loss of a batch becomes a loss of rows."""

    def __init__(self, config: SimpleNamespace | None = None) -> None:
        super().__init__()
        self.head = nn.Linear(C, C, bias=False, dtype=torch.float64)
        self.head.weight = nn.Parameter(torch.eye(C, dtype=torch.float64))
        self.config = config

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return labels

    def forward(self, rows: Tensor, decoder_input_ids: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(rows)
        config = self.config
        if config is not None:
            logits = config.logit_scale * logits
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)
        return SimpleNamespace(logits=logits)


class TeacherOfRows(RowsModel):
    """Its hidden states are a batch entry of their own, so that they do not move with the student's."""

    def forward(self, rows: Tensor, teacher: Tensor) -> SimpleNamespace:
        return super().forward(teacher)


class StudentOfRows(RowsModel):
    def forward(self, rows: Tensor, teacher: Tensor) -> SimpleNamespace:
        return super().forward(rows)


def of_batch(
    loss: object, z: Tensor, t: Tensor, *, shifted: bool = False, config: SimpleNamespace | None = None
) -> Tensor:
    if shifted:  # the last position predicts nothing, the first label is predicted by nothing
        z, t = torch.cat([z, z[:1]]), torch.cat([t[:1], t])
    batch = {"rows": z[None], "labels": t[None]}
    assert loss.count_targets(batch) == int((t[1:] if shifted else t).ne(-100).sum())
    return loss(RowsModel(config), batch)


def pair_parts(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of a labelled row's own class (chosen) and the next one (rejected), and the reference's."""
    z, t = z[t != -100], t[t != -100]
    rows, other = torch.arange(len(t)), (t + 1) % C
    log_p, log_r = torch.log_softmax(z, -1), torch.log_softmax(TEACHER[t], -1)
    return log_p[rows, t], log_p[rows, other], log_r[rows, t], log_r[rows, other]


def of_pairs(z: Tensor, t: Tensor, *, reduction: str = "mean", **options: object) -> Tensor:
    value = dpo_loss(*pair_parts(z, t), reduction=reduction, **options)
    return value if reduction == "mean" else value.sum() / (t != -100).sum()


def of_pair_batch(loss: DPOLoss, z: Tensor, t: Tensor) -> Tensor:
    _, _, chosen, rejected = pair_parts(z, t)
    rows, valid = z[t != -100], t[t != -100]
    first = torch.full_like(valid, -100)
    labels = torch.stack([first, valid, first, (valid + 1) % C], 1).reshape(-1, 2)
    batch = {
        "rows": rows.repeat_interleave(2, 0)[:, None].expand(-1, 2, -1),
        "labels": labels,
        "chosen": torch.tensor([True, False]).repeat(len(rows)),
        "reference_chosen": chosen,
        "reference_rejected": rejected,
    }
    assert loss.count_targets(batch) == len(rows)
    return loss(RowsModel(), batch)[0]


def plain_dpo(z: Tensor, t: Tensor, *, beta: float = 0.1, e: float = 0.0, ipo: bool = False) -> Tensor:
    chosen, rejected, chosen_r, rejected_r = pair_parts(z, t)
    h = chosen - rejected - chosen_r + rejected_r
    if ipo:
        return ((h - 0.5 / beta) ** 2).mean()
    right, wrong = 1 / (1 + torch.exp(-beta * h)), 1 / (1 + torch.exp(beta * h))
    return -((1 - e) * torch.log(right) + e * torch.log(wrong)).mean()


class EmbeddingModel(nn.Module):
    """An encoder whose hidden states and logits are its input."""

    def forward(self, rows: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=rows, logits=rows[:, 0])


def of_embeddings(loss: LossFunction, z: Tensor, t: Tensor) -> Tensor:
    found = loss(EmbeddingModel(), {"rows": z[:, None], "labels": t})
    return found[0] if isinstance(found, tuple) else found


def plain_supervised_contrastive(z: Tensor, t: Tensor, *, temperature: float = 0.1) -> Tensor:
    """The formula, row by row and pair by pair."""
    z, t = z[t != -100], t[t != -100]
    z = z / z.square().sum(1, keepdim=True).sqrt()
    losses = []
    for i in range(len(t)):
        others = [a for a in range(len(t)) if a != i]
        below = sum(torch.exp(z[i] @ z[a] / temperature) for a in others)
        mates = [-torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in others if t[p] == t[i]]
        if mates:
            losses.append(sum(mates) / len(mates))
    return sum(losses) / len(losses)


def plain_folded(z: Tensor, t: Tensor, *, temperature: float = 0.8) -> Tensor:
    """Each row by the formula, its own class's mean made of the others."""
    z, t = z[t != -100], t[t != -100]
    losses = []
    for i in range(len(t)):
        others = [j for j in range(len(t)) if j != i]
        near = {}
        for k in set(t.tolist()):
            mates = [z[j] for j in others if t[j] == k]
            if mates:
                near[k] = torch.exp(-((z[i] - sum(mates) / len(mates)) ** 2).sum() / temperature)
        if int(t[i]) in near:
            losses.append(-torch.log(near[int(t[i])] / sum(near.values())))
    return sum(losses) / len(losses)


def plain_mixture(z: Tensor, t: Tensor) -> Tensor:
    return 0.25 * plain_cross_entropy(z, t) + 0.75 * plain_supervised_contrastive(z, t, temperature=0.3)


def of_keys(z: Tensor, t: Tensor, *, reduction: str = "mean") -> Tensor:
    """Each labelled row's key is its class's row of TEACHER; rows of one class share a key."""
    z, t = z[t != -100], t[t != -100]
    value = info_nce_loss(z, TEACHER[t], temperature=0.5, ids=t, reduction=reduction)
    return value if reduction == "mean" else value.sum() / len(t)


def plain_keys(z: Tensor, t: Tensor) -> Tensor:
    z, t = z[t != -100], t[t != -100]
    q, k = (x / x.square().sum(1, keepdim=True).sqrt() for x in (z, TEACHER[t]))
    losses = []
    for i in range(len(t)):
        scores = torch.stack([torch.exp(q[i] @ k[j] / 0.5) for j in range(len(t)) if j == i or t[j] != t[i]])
        losses.append(-torch.log(torch.exp(q[i] @ k[i] / 0.5) / scores.sum()))
    return sum(losses) / len(losses)


SUPPORT = torch.arange(2 * C) % C  # two examples of each class
EXAMPLES = torch.cat([TEACHER, MIX])


def of_support(z: Tensor, t: Tensor, *, reduction: str = "mean", **options: object) -> Tensor:
    value = prototypical_loss(EXAMPLES, SUPPORT, z, t, reduction=reduction, **options)
    return value if reduction == "mean" else value.sum() / (t != -100).sum()


def plain_prototypical(z: Tensor, t: Tensor, *, cosine: bool = False, temperature: float = 1.0) -> Tensor:
    z, t = z[t != -100], t[t != -100]
    means = (TEACHER + MIX) / 2
    if cosine:
        d = 1 - (z @ means.T) / (z.square().sum(1).sqrt()[:, None] * means.square().sum(1).sqrt())
    else:
        d = torch.stack([((row - means) ** 2).sum(1) for row in z])
    return plain_cross_entropy(-d / temperature, t)


class TwoDraws(RowsModel):
    """The same, in train mode, whose every second pass gives other logits of a row, as dropout would."""

    passes = 0

    def forward(self, rows: Tensor, decoder_input_ids: Tensor | None = None) -> SimpleNamespace:
        self.passes += 1
        return super().forward(rows if self.passes % 2 else 0.7 * rows.flip(-1))


def twice(loss: object, z: Tensor, t: Tensor, *, shifted: bool = False) -> Tensor:
    if shifted:
        z, t = torch.cat([z, z[:1]]), torch.cat([t[:1], t])
    return loss(TwoDraws(), {"rows": z[None], "labels": t[None]})[0]


def r_drop(z: Tensor, t: Tensor) -> Tensor:
    return r_drop_loss(z, 0.7 * z.flip(-1), t, alpha=1.5)


def plain_r_drop(z: Tensor, t: Tensor) -> Tensor:
    p, q = (torch.softmax(logits[t != -100], -1) for logits in (z, 0.7 * z.flip(-1)))
    divergence = (p * torch.log(p / q)).sum(-1) + (q * torch.log(q / p)).sum(-1)
    return (plain_cross_entropy(z, t) + plain_cross_entropy(0.7 * z.flip(-1), t) + 1.5 * divergence.mean()) / 2


class Classifier(nn.Module):
    """Its logits are its input."""

    def forward(self, rows: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=rows)


OLD = torch.tensor([at % 2 == 0 for at in range(C)])  # the classes whose rows are replayed: they have predictions


def of_cache(loss: object, z: Tensor, t: Tensor, *, k: int, temperature: float = 1.0, mixed: bool = False) -> Tensor:
    """A causal model's loss of rows with the k largest log-probabilities of TEACHER; mixed: only of the OLD ones."""
    kept, index = top_k_log_probabilities(TEACHER[t.clamp(min=0)], k, temperature=temperature)
    index = index.masked_fill(((t == -100) | (mixed & ~OLD[t.clamp(min=0)]))[:, None], -1)
    fields = {
        "teacher_logprobs": kept,
        "teacher_indices": index,
        "teacher_temperature": torch.full((len(t),), temperature),
    }
    batch = {name: torch.cat([value[:1], value])[None] for name, value in fields.items()}  # the first is no target
    batch |= {"rows": torch.cat([z, z[:1]])[None], "labels": torch.cat([t[:1], t])[None]}
    return loss(RowsModel(), batch)[0]


def of_kept_logits(loss: object, z: Tensor, t: Tensor, *, mixed: bool = False) -> Tensor:
    """A classifier's loss of rows with the first five of TEACHER's logits, as of a head that has grown since."""
    kept = TEACHER[t.clamp(min=0)][:, :5].clone()
    if mixed:
        kept[~OLD[t.clamp(min=0)]] = torch.nan
    return loss(Classifier(), {"rows": z, "labels": t, "teacher_logits": kept})[0]


def to_model(loss: DistillToModel, z: Tensor, t: Tensor) -> Tensor:
    batch = {
        "rows": torch.cat([z, z[:1]])[None],
        "teacher": TEACHER[torch.cat([t, t[:1]]).clamp(min=0)][None],
        "labels": torch.cat([t[:1], t])[None],
    }
    return loss(StudentOfRows(), batch)[0]


def plain_old_classes(z: Tensor, t: Tensor, *, temperature: float) -> Tensor:
    s = torch.softmax(z[t != -100][:, :5] / temperature, -1)
    return temperature**2 * kl(torch.softmax(TEACHER[t[t != -100]][:, :5] / temperature, -1), s)


def plain_der(z: Tensor, t: Tensor, *, alpha: float, beta: float, k: int | None = None) -> Tensor:
    """Row by row: a new one's cross-entropy, an old one's distance and a share of its cross-entropy."""
    losses = []
    for logits, target in zip(z[t != -100], t[t != -100], strict=True):
        p, q = torch.softmax(TEACHER[target], -1), torch.softmax(logits, -1)
        if k is None:
            distance = ((logits - TEACHER[target])[:5] ** 2).sum()
        else:
            order = p.argsort(descending=True)
            p, q_top = p[order], q[order]
            p, q_top = (torch.cat([x[:k], x[k:].sum()[None]]) for x in (p, q_top))
            distance = (p * torch.log(p / q_top)).sum()
        cost = -torch.log(q[target])
        losses.append(alpha * distance + beta * cost if OLD[target] else cost)
    return torch.stack(losses).mean()


DISTILLED = {"strength": 0.7, "temperature": 1.7}
DER = {"alpha": 0.3, "beta": 0.6}
SMOOTH = {"label_smoothing": 0.3, "z_loss": 0.2}
PLAIN_SMOOTH = {"e": 0.3, "zl": 0.2}
CONFIG = SimpleNamespace(final_logit_softcapping=1.3, logit_scale=0.7)
ALL = {**SMOOTH, "softcap": 1.3, "logit_scale": 0.7}
PLAIN_ALL = {**PLAIN_SMOOTH, "cap": 1.3, "scale": 0.7}

WEIGHTS = torch.linspace(0.5, 2.0, C, dtype=torch.float64)
CONFIDENT = {"strength": 0.3}
THRESHOLD = {"strength": 0.3, "threshold": 1.2}  # some rows of the laws' logits have more entropy, some less


def distilled_features(z: Tensor, t: Tensor) -> Tensor:
    loss = FeatureDistillationLoss(TeacherOfRows(), MaskedLMLoss(), strength=0.7)
    batch = {"rows": z[None], "teacher": TEACHER[t.clamp(min=0)][None], "labels": t[None]}
    return loss(StudentOfRows(), batch)[0]


def plain_distilled(z: Tensor, t: Tensor) -> Tensor:
    return plain_cross_entropy(z, t) + 0.7 * plain_features(z, t)


LOSSES = {
    "linear_cross_entropy": (through_head, plain_through_head),
    "linear_cross_entropy, sum": (partial(through_head, reduction="sum"), plain_through_head),
    "linear_cross_entropy, per row": (partial(through_head, reduction="none"), plain_through_head),
    "linear_cross_entropy, label_smoothing": (
        partial(through_head, label_smoothing=0.3),
        partial(plain_through_head, e=0.3),
    ),
    "linear_cross_entropy, z_loss": (partial(through_head, z_loss=0.2), partial(plain_through_head, zl=0.2)),
    "linear_cross_entropy, softcap": (partial(through_head, softcap=1.3), partial(plain_through_head, cap=1.3)),
    "linear_cross_entropy, logit_scale": (
        partial(through_head, logit_scale=0.7),
        partial(plain_through_head, scale=0.7),
    ),
    "linear_cross_entropy, all options": (partial(through_head, **ALL), partial(plain_through_head, **PLAIN_ALL)),
    "linear_cross_entropy, all options, per row": (
        partial(through_head, reduction="none", **ALL),
        partial(plain_through_head, **PLAIN_ALL),
    ),
    "kl_divergence": (of_logits, plain_kl),
    "kl_divergence, temperature": (partial(of_logits, temperature=2.5), partial(plain_kl, temperature=2.5)),
    "kl_divergence, reverse": (
        partial(of_logits, temperature=0.7, direction="reverse"),
        partial(plain_kl, temperature=0.7, direction="reverse"),
    ),
    "linear_kl_divergence": (of_heads, plain_kl),
    "linear_kl_divergence, temperature": (partial(of_heads, temperature=2.5), partial(plain_kl, temperature=2.5)),
    "linear_kl_divergence, reverse": (
        partial(of_heads, temperature=0.7, direction="reverse"),
        partial(plain_kl, temperature=0.7, direction="reverse"),
    ),
    **{
        f"{name}, {direction}": (
            partial(loss, temperature=1.7, direction=direction),
            partial(plain_kl, temperature=1.7, direction=direction),
        )
        for name, loss in (("kl_divergence", of_logits), ("linear_kl_divergence", of_heads))
        for direction in ("symmetric", "jensen-shannon")
    },
    "top_k_kl_divergence": (partial(of_top_k, k=3), partial(plain_top_k, k=3)),
    "top_k_kl_divergence, temperature": (
        partial(of_top_k, k=2, temperature=2.5),
        partial(plain_top_k, k=2, temperature=2.5),
    ),
    "top_k_kl_divergence, no tail": (partial(of_top_k, k=3, tail=False), partial(plain_top_k, k=3, tail=False)),
    "top_k_kl_divergence, all": (partial(of_top_k, k=C, temperature=1.3), partial(plain_kl, temperature=1.3)),
    "focal_loss": (focal_loss, partial(plain_focal, gamma=2.0)),
    "focal_loss, gamma 0.5": (partial(focal_loss, gamma=0.5), partial(plain_focal, gamma=0.5)),
    "focal_loss, class_weights": (
        partial(focal_loss, gamma=1.5, class_weights=WEIGHTS),
        partial(plain_focal, gamma=1.5, weights=WEIGHTS),
    ),
    "own_classes_cross_entropy": (
        partial(own_classes_cross_entropy, own=(5, 0, 3)),
        partial(plain_own_classes, own=(0, 3, 5)),
    ),
    "OwnClassesLoss": (partial(of_batch, OwnClassesLoss((2, 4))), partial(plain_own_classes, own=(2, 4))),
    "FocalLoss": (
        partial(of_batch, FocalLoss(1.5, class_weights=tuple(WEIGHTS.tolist()))),
        partial(plain_focal, gamma=1.5, weights=WEIGHTS),
    ),
    "confidence_penalty": (
        lambda z, t: confidence_penalty(z, mask=t != -100),
        lambda z, t: -plain_entropy(z[t != -100]).mean(),
    ),
    "ConfidencePenaltyLoss, causal": (
        partial(of_batch, ConfidencePenaltyLoss(**CONFIDENT), shifted=True),
        plain_confident,
    ),
    "ConfidencePenaltyLoss, causal, all options": (
        partial(of_batch, ConfidencePenaltyLoss(CausalLMLoss(**SMOOTH), **THRESHOLD), shifted=True, config=CONFIG),
        partial(plain_confident, threshold=1.2, **PLAIN_ALL),
    ),
    "ConfidencePenaltyLoss, masked": (
        partial(of_batch, ConfidencePenaltyLoss(MaskedLMLoss(), **THRESHOLD)),
        partial(plain_confident, threshold=1.2),
    ),
    "ConfidencePenaltyLoss, sequence to sequence": (
        partial(of_batch, ConfidencePenaltyLoss(SequenceToSequenceLoss(), **CONFIDENT), config=CONFIG),
        partial(plain_confident, cap=1.3, scale=0.7),
    ),
    "ConfidencePenaltyLoss, classes": (
        partial(of_batch, ConfidencePenaltyLoss(ClassificationLoss(label_smoothing=0.3), **THRESHOLD)),
        partial(plain_confident, threshold=1.2, e=0.3),
    ),
    "feature_distillation_loss": (of_features, plain_features),
    "feature_distillation_loss, cosine": (partial(of_features, kind="cosine"), partial(plain_features, kind="cosine")),
    "feature_distillation_loss, projection": (
        partial(of_features, projection=lambda x: x @ MIX.T),
        partial(plain_features, projection=MIX),
    ),
    "FeatureDistillationLoss": (distilled_features, plain_distilled),
    "DistillFromCache": (
        partial(of_cache, DistillFromCache(**DISTILLED), k=3, temperature=1.7),
        lambda z, t: plain_cross_entropy(z, t) + 0.7 * plain_top_k(z, t, k=3, temperature=1.7),
    ),
    "DistillFromCache, old classes": (
        partial(of_kept_logits, DistillFromCache(ClassificationLoss(), **DISTILLED)),
        lambda z, t: plain_cross_entropy(z, t) + 0.7 * plain_old_classes(z, t, temperature=1.7),
    ),
    "DistillToModel": (
        partial(to_model, DistillToModel(TeacherOfRows(), **DISTILLED)),
        lambda z, t: plain_cross_entropy(z, t) + 0.7 * plain_kl(z, t, temperature=1.7),
    ),
    "DERLoss": (partial(of_cache, DERLoss(**DER), k=2, mixed=True), partial(plain_der, **DER, k=2)),
    "DERLoss, classes": (
        partial(of_kept_logits, DERLoss(ClassificationLoss(), **DER), mixed=True),
        partial(plain_der, **DER),
    ),
    "DERLoss, beta 0": (
        partial(of_kept_logits, DERLoss(ClassificationLoss(), alpha=0.3), mixed=True),
        partial(plain_der, alpha=0.3, beta=0.0),
    ),
    "CausalLMLoss": (partial(of_batch, CausalLMLoss(), shifted=True), plain_cross_entropy),
    "CausalLMLoss, all options": (
        partial(of_batch, CausalLMLoss(**SMOOTH), shifted=True, config=CONFIG),
        partial(plain_cross_entropy, **PLAIN_ALL),
    ),
    "MaskedLMLoss": (partial(of_batch, MaskedLMLoss()), plain_cross_entropy),
    "MaskedLMLoss, all options": (
        partial(of_batch, MaskedLMLoss(**SMOOTH), config=CONFIG),
        partial(plain_cross_entropy, **PLAIN_ALL),
    ),
    "SequenceToSequenceLoss": (partial(of_batch, SequenceToSequenceLoss()), plain_cross_entropy),
    "SequenceToSequenceLoss, all options": (
        partial(of_batch, SequenceToSequenceLoss(**SMOOTH), config=CONFIG),
        partial(plain_cross_entropy, **PLAIN_ALL),
    ),
    "ClassificationLoss": (partial(of_batch, ClassificationLoss()), plain_cross_entropy),
    "ClassificationLoss, label_smoothing": (
        partial(of_batch, ClassificationLoss(label_smoothing=0.3)),
        partial(plain_cross_entropy, e=0.3),
    ),
    "dpo_loss": (of_pairs, plain_dpo),
    "dpo_loss, label_smoothing": (
        partial(of_pairs, beta=0.7, label_smoothing=0.2),
        partial(plain_dpo, beta=0.7, e=0.2),
    ),
    "dpo_loss, ipo, per row": (
        partial(of_pairs, beta=0.3, kind="ipo", reduction="none"),
        partial(plain_dpo, beta=0.3, ipo=True),
    ),
    "DPOLoss": (partial(of_pair_batch, DPOLoss(beta=0.7)), partial(plain_dpo, beta=0.7)),
    "DPOLoss, ipo": (partial(of_pair_batch, DPOLoss(kind="ipo")), partial(plain_dpo, ipo=True)),
    "supervised_contrastive_loss": (supervised_contrastive_loss, plain_supervised_contrastive),
    "supervised_contrastive_loss, temperature": (
        partial(supervised_contrastive_loss, temperature=0.7),
        partial(plain_supervised_contrastive, temperature=0.7),
    ),
    "SupervisedContrastiveLoss": (partial(of_embeddings, SupervisedContrastiveLoss()), plain_supervised_contrastive),
    "SupervisedContrastiveLoss, with cross-entropy": (
        partial(of_embeddings, SupervisedContrastiveLoss(0.3, 0.75)),
        plain_mixture,
    ),
    "info_nce_loss": (of_keys, plain_keys),
    "info_nce_loss, sum": (partial(of_keys, reduction="sum"), plain_keys),
    "prototypical_loss": (of_support, plain_prototypical),
    "prototypical_loss, sum": (partial(of_support, reduction="sum"), plain_prototypical),
    "prototypical_loss, cosine, per row": (
        partial(of_support, distance="cosine", temperature=0.2, reduction="none"),
        partial(plain_prototypical, cosine=True, temperature=0.2),
    ),
    "PrototypicalLoss": (partial(of_embeddings, PrototypicalLoss(temperature=0.8)), plain_folded),
    "r_drop_loss": (r_drop, plain_r_drop),
    "RDropLoss of CausalLMLoss": (partial(twice, RDropLoss(alpha=1.5), shifted=True), plain_r_drop),
    "RDropLoss of MaskedLMLoss": (partial(twice, RDropLoss(MaskedLMLoss(), alpha=1.5)), plain_r_drop),
    "RDropLoss of SequenceToSequenceLoss": (
        partial(twice, RDropLoss(SequenceToSequenceLoss(), alpha=1.5)),
        plain_r_drop,
    ),
    "RDropLoss of ClassificationLoss": (partial(twice, RDropLoss(ClassificationLoss(), alpha=1.5)), plain_r_drop),
}
COUPLED = ("supervised_contrastive_loss", "SupervisedContrastiveLoss", "info_nce_loss", "PrototypicalLoss")


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_laws(name: str) -> None:
    check_loss(*LOSSES[name], exempt=["rows coupled"] if name.startswith(COUPLED) else [])


def test_exemptions_are_few_and_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match='there is no exemption "order", only rows coupled'):
        check_loss(*LOSSES["kl_divergence"], exempt=["order"])
    with pytest.raises(LawBroken, match="sum over splits: the loss is exempt from this law and keeps it"):
        check_loss(*LOSSES["kl_divergence"], exempt=["rows coupled"])
    assert "not checked: sum over splits: each row is compared with the others" in capsys.readouterr().out
    with pytest.raises(LawBroken, match="sum over splits"):
        check_loss(*LOSSES["SupervisedContrastiveLoss, with cross-entropy"])


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad / 2


def unsmoothed(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t)


def masked_by_product(z: Tensor, t: Tensor) -> Tensor:
    losses = F.cross_entropy(z, t.clamp(min=0), reduction="none")
    return (losses * (t != -100)).sum() / (t != -100).sum()


def mean_over_all_rows(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(z, t, reduction="sum") / len(t)


def weighted_by_place(z: Tensor, t: Tensor) -> Tensor:
    valid = t != -100
    weights = torch.linspace(0.5, 1.5, len(t), dtype=z.dtype)[valid]
    return (F.cross_entropy(z[valid], t[valid], reduction="none") * weights).mean()


def half_the_gradient(z: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(HalfGradient.apply(z), t)


def deaf_to_its_factor(z: Tensor, t: Tensor) -> Tensor:
    class Deaf(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                loss = F.cross_entropy(y, t)
                ctx.grad = torch.autograd.grad(loss, y)[0]
            return loss.detach()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            return ctx.grad

    return Deaf.apply(z)


def test_each_law_catches_its_fault() -> None:
    logits, targets = loss_inputs()
    smoothed = partial(plain_cross_entropy, e=0.1)
    with pytest.raises(LawBroken, match="equal to the reference: loss"):
        loss_equals_reference(unsmoothed, smoothed, logits, targets)
    with pytest.raises(LawBroken, match="equal to the reference: gradient"):
        loss_equals_reference(half_the_gradient, plain_cross_entropy, logits, targets)
    with pytest.raises(LawBroken, match="ignored rows"):
        loss_ignores_rows(masked_by_product, logits, targets)
    with pytest.raises(LawBroken, match="sum over splits"):
        loss_adds_up(mean_over_all_rows, logits, targets)
    with pytest.raises(LawBroken, match="order: loss"):
        loss_has_no_order(weighted_by_place, logits, targets)
    with pytest.raises(LawBroken, match="gradient: "):
        loss_has_its_gradient(half_the_gradient, logits, targets)
    with pytest.raises(LawBroken, match="gradient: "):
        loss_has_its_gradient(deaf_to_its_factor, logits, targets)
    with pytest.raises(LawBroken, match="must be a scalar with a gradient"):
        loss_equals_reference(lambda z, t: z, plain_cross_entropy, logits, targets)


@pytest.mark.parametrize(
    "fault", [unsmoothed, masked_by_product, mean_over_all_rows, weighted_by_place, half_the_gradient]
)
def test_check_loss_catches_every_fault(fault: object) -> None:
    with pytest.raises(LawBroken):
        check_loss(fault, partial(plain_cross_entropy, e=0.1))


def test_torchs_own_loss_breaks_the_law_of_ignored_rows() -> None:
    """F.cross_entropy ignores a row's target but lets NaN in the row's logits into the gradient's zero."""
    with pytest.raises(LawBroken, match="ignored rows: gradient with nan"):
        check_loss(F.cross_entropy, plain_cross_entropy)
