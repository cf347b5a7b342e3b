from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from llmtune.losses.focal import FocalLoss, focal_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert
from llmtune.types import LossFunction


def test_closed_form_of_two_classes() -> None:
    """p_t = 3/4 and 1/4: (1/4)^2 log 4/3 and (3/4)^2 log 4."""
    logits = torch.tensor([[1.0, 3.0]] * 2, dtype=torch.float64).log()
    rows = focal_loss(logits, torch.tensor([1, 0]), gamma=2.0, reduction="none")
    four = torch.tensor(4.0, dtype=torch.float64).log()
    want = torch.stack([(four - torch.tensor(3.0, dtype=torch.float64).log()) / 16, four * 9 / 16])
    assert_close(rows, want)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_at_gamma_zero(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (3, 5), generator=generator)
    targets[1, 2] = -100
    weights = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    ours = focal_loss(logits, targets, gamma=0.0, reduction=reduction)
    theirs = F.cross_entropy(logits.movedim(-1, 1), targets, reduction=reduction)
    assert_close(ours, theirs)
    (grad,), (want,) = (torch.autograd.grad(x.sum(), logits) for x in (ours, theirs))
    assert_close(grad, want)
    weighted = focal_loss(logits, targets, gamma=0.0, class_weights=weights, reduction="sum")
    assert_close(weighted, F.cross_entropy(logits.movedim(-1, 1), targets, weight=weights, reduction="sum"))
    # torch's weighted mean is over the weights, ours over the rows
    assert_close(focal_loss(logits, targets, gamma=0.0, class_weights=weights), weighted / 14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 2.0, 5.0])
def test_finite_gradients_where_the_target_is_certain(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [30.0, 0.0, 0.0], [10.0, 0.0, 0.0], [-200.0, 0.0, 0.0]], dtype=dtype)
    logits.requires_grad_()
    rows = focal_loss(logits, torch.zeros(4, dtype=torch.long), gamma=gamma, reduction="none")
    (grad,) = torch.autograd.grad(rows.sum(), logits, create_graph=True)
    assert grad.isfinite().all()
    assert (rows >= 0).all()
    assert rows[0].double() < 1e-80  # in float32 that number is itself 0
    if gamma:
        assert torch.autograd.grad(grad.square().sum(), logits)[0].isfinite().all()


def test_the_formula_as_it_is_mostly_written_breaks_at_a_certain_target() -> None:
    """(1 - softmax)^gamma has an infinite slope at p_t = 1 for gamma below 1."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    p = logits.softmax(-1)[:, 0]
    (grad,) = torch.autograd.grad((-((1 - p) ** 0.5) * p.log()).sum(), logits)
    assert grad.isnan().any()
    loss = focal_loss(logits, torch.tensor([0]), gamma=0.5)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-30
    kornia = logits.double().softmax(-1)[:, 0] + 1e-8  # to keep the logarithm finite; it is larger than 1
    assert ((1 - kornia) ** 0.5).isnan().all()


def test_small_losses_keep_their_digits() -> None:
    """At p_t = 1 - 2e-5 in float32, where 1 - p_t from the softmax has lost most of its digits."""
    logits, target = torch.tensor([[10.82, 0.0, -1.0]]), torch.tensor([0])
    exact = focal_loss(logits.double(), target, gamma=2.0)
    assert_close(focal_loss(logits, target, gamma=2.0).double(), exact, rtol=1e-5)
    p = logits.softmax(-1)[0, 0]
    assert abs(-((1 - p) ** 2) * p.log() - exact) > 1e-3 * exact


def test_classes_that_cannot_be() -> None:
    """Logits of -inf at other classes, at all other classes, and at the target."""
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, -torch.inf, -torch.inf]], requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        rows = focal_loss(logits, torch.tensor([0, 0]), gamma=gamma, reduction="none")
        p = torch.tensor(1.0).exp().add(1).reciprocal()
        assert_close(rows, torch.stack([-((1 - p) ** gamma) * p.log(), torch.zeros(())]))
        assert torch.autograd.grad(rows.sum(), logits)[0].isfinite().all()
    assert focal_loss(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([0])) == torch.inf


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_second_derivatives_are_right(gamma: float) -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2, -100, 1, 1])
    assert torch.autograd.gradgradcheck(lambda z: focal_loss(z, targets, gamma=gamma), logits)


def test_ignored_rows_and_another_ignore_index() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 2, -1, 1, -1])
    spoilt = logits.masked_fill((targets == -1)[:, None], torch.nan)
    assert torch.equal(
        focal_loss(spoilt, targets, ignore_index=-1), focal_loss(logits[targets >= 0], targets[targets >= 0])
    )
    nothing = torch.full((5,), -100)
    assert focal_loss(logits, nothing, reduction="sum") == 0
    with pytest.raises(ValueError, match=r"all 5 are ignored \(all -100\)"):
        focal_loss(logits, nothing)


def test_half_precision_is_computed_in_float32() -> None:
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.tensor([0, 2, 1, 1, 0])
    loss = focal_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, focal_loss(logits.float(), targets))


def test_the_loss_of_a_sequence_classifier() -> None:
    model = tiny_bert(labels=5)
    batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1], [9, 9, 8]]), "labels": torch.tensor([2, -100, 4])}
    loss = FocalLoss(class_weights=[0.5, 1, 1.5, 2, 2.5])
    assert isinstance(loss, LossFunction)
    assert loss.count_targets(batch) == 2
    logits = model(input_ids=batch["input_ids"]).logits
    p = logits.softmax(-1)[[0, 2], [2, 4]]
    assert_close(loss(model, batch), (-torch.tensor([1.5, 2.5]) * (1 - p) ** 2 * p.log()).mean(), rtol=1e-5)


def test_the_loss_of_a_token_classifier() -> None:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=97, hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=29, num_labels=5
    )
    model = BertForTokenClassification(config).eval()
    ids = torch.tensor([[5, 7, 11], [3, 2, 1]])
    labels = torch.tensor([[1, -100, 4], [-100, 0, -100]])
    batch = {"input_ids": ids, "labels": labels}
    assert FocalLoss().count_targets(batch) == 3
    p = model(input_ids=ids).logits.softmax(-1)[labels != -100][range(3), [1, 4, 0]]
    assert_close(FocalLoss()(model, batch), (-((1 - p) ** 2) * p.log()).mean(), rtol=1e-5)


def test_bad_input_is_named() -> None:
    logits, targets = torch.zeros(5, 3), torch.zeros(5, dtype=torch.long)
    for gamma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="gamma must be a finite number, 0 or more"):
            focal_loss(logits, targets, gamma=gamma)
        with pytest.raises(ValueError, match="gamma must be a finite number, 0 or more"):
            FocalLoss(gamma)
    with pytest.raises(
        ValueError, match=r"expected logits \[\.\.\., C\] and targets \[\.\.\.\]; got \[5, 3\] and \[4\]"
    ):
        focal_loss(logits, targets[1:])
    with pytest.raises(ValueError, match=r"targets must be in 0 \.\.\. 2 .* target 0 is 3"):
        focal_loss(logits, targets + 3)
    with pytest.raises(TypeError, match="targets must be integers"):
        focal_loss(logits, targets.double())
    with pytest.raises(ValueError, match=r"expected class_weights \[3\], one a class; got \[2\]"):
        focal_loss(logits, targets, class_weights=torch.ones(2))
    for weights in ((0.0, 0.0), (-1.0, 1.0), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="class_weights must be finite, 0 or more and not all 0"):
            FocalLoss(class_weights=weights)
    with pytest.raises(ValueError, match="reduction must be"):
        focal_loss(logits, targets, reduction="max")
    batch = {"input_ids": torch.tensor([[5, 7]]), "labels": torch.tensor([0.5])}
    with pytest.raises(ValueError, match=r"needs integer labels, one class each; got torch\.float32"):
        FocalLoss()(tiny_bert(labels=2), batch)
    with pytest.raises(ValueError, match=r"expected class_weights \[2\], one a class; got \[3\]"):
        FocalLoss(class_weights=(1.0, 1.0, 1.0))(tiny_bert(labels=2), {**batch, "labels": torch.tensor([1])})
