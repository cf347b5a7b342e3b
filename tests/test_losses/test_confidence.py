from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.confidence import ConfidencePenaltyLoss, SureCrossEntropy, confidence_penalty
from llmtune.losses.cross_entropy import CrossEntropy
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.types import LossFunction


def test_minus_the_entropy_of_known_distributions() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [900.0, 0.0, 0.0, 0.0], [0.0, -torch.inf, 0.0, -torch.inf]])
    logits.requires_grad_()
    rows = confidence_penalty(logits, reduction="none")
    assert_close(rows, torch.tensor([-math.log(4), 0.0, -math.log(2)]))
    assert torch.autograd.grad(rows.sum(), logits)[0].abs().max() < 1e-6


def test_masked_rows_change_nothing_even_by_nan() -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    spoilt = logits.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    want = -torch.distributions.Categorical(logits=logits).entropy()
    loss = confidence_penalty(spoilt, mask=mask)
    assert_close(loss, want[mask].mean())
    assert_close(confidence_penalty(spoilt, mask=mask, reduction="sum"), want[mask].sum())
    assert_close(confidence_penalty(spoilt, mask=mask, reduction="none"), torch.where(mask, want, 0.0))
    assert not torch.autograd.grad(loss, spoilt)[0][~mask].any()


def test_gradients_are_right() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(confidence_penalty, logits)
    assert torch.autograd.gradgradcheck(confidence_penalty, logits)


CASES = {
    "causal": (tiny_llama, causal_lm_loss),
    "masked": (tiny_bert, masked_lm_loss),
    "sequence to sequence": (tiny_t5, sequence_to_sequence_loss),
    "classes": (lambda: tiny_bert(labels=5), classification_loss),
}


@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loss_less_the_entropy_at_labelled_places(name: str, hinge: bool) -> None:
    make, loss = CASES[name]
    model = make().double()
    labels = torch.tensor([2, 0]) if name == "classes" else torch.tensor([[5, -100, 11, 3], [13, 17, -100, 19]])
    batch = {"input_ids": torch.tensor([[5, 7, 11, 3], [13, 17, 6, 19]]), "labels": labels}
    given = batch if name == "sequence to sequence" else {"input_ids": batch["input_ids"]}
    logits = model(**given).logits
    if name == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    entropy = torch.distributions.Categorical(logits=logits[labels != -100]).entropy()
    threshold = entropy.mean().item() if hinge else None  # some pay, some do not
    ours = ConfidencePenaltyLoss(loss, strength=3.0, threshold=threshold)
    assert isinstance(ours, LossFunction)
    assert ours.count_targets(batch) == loss.count_targets(batch) == len(entropy)
    cost = (threshold - entropy).clamp(min=0) if hinge else -entropy
    want = F.cross_entropy(logits[labels != -100], labels[labels != -100]) + 3.0 * cost.mean()
    value = ours(model, batch)
    assert_close(value, want)
    found, expected = (
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(x, list(model.parameters()), allow_unused=True) if g is not None]
        )
        for x in (value, want)
    )
    assert_close(found, expected, rtol=1e-8)


def test_the_threshold_is_a_penalty_and_not_a_reward() -> None:
    """The paper prints CE - strength * max(0, threshold - H), which would pay for confidence; NetCal computes it so."""
    rows = SureCrossEntropy(CrossEntropy(), 1.0, 0.5)
    sure, target = torch.tensor([[3.0, 0.0]], requires_grad=True), (torch.tensor([0]),)
    extra = rows.plain(sure, target) - F.cross_entropy(sure, target[0], reduction="none")
    entropy = torch.distributions.Categorical(logits=sure).entropy()
    assert_close(extra, 0.5 - entropy)
    (grad,) = torch.autograd.grad(extra.sum(), sure)
    assert grad[0, 0] > 0  # a step against the gradient lowers the larger logit
    unsure = torch.tensor([[0.1, 0.0]])
    assert torch.equal(rows.plain(unsure, target), F.cross_entropy(unsure, target[0], reduction="none"))


def test_strength_zero_is_the_loss_itself() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
    batch = {"input_ids": ids, "labels": ids}
    for loss in (causal_lm_loss, CausalLMLoss(label_smoothing=0.1, z_loss=0.01)):
        assert_close(ConfidencePenaltyLoss(loss, strength=0.0)(model, batch), loss(model, batch), rtol=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_packed_and_padded_rows_agree(make: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 11, 3)]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]
    loss, model = ConfidencePenaltyLoss(strength=0.5), make()
    assert_close(loss(model, collate_packed(rows)), loss(model, collate_padded(rows)))


def test_under_autocast_and_with_an_adapter_on_the_head() -> None:
    from llmtune.adapters.attach import attach
    from llmtune.adapters.config import LoRA

    model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
    batch = {"input_ids": ids, "labels": ids}
    loss = ConfidencePenaltyLoss(strength=0.5, threshold=4.56)
    plain = loss(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(model, batch)
    assert half.dtype == torch.float32
    assert_close(half, plain, rtol=2e-2)
    attach(model, LoRA(rank=2, alpha=4, targets=("q_proj", "lm_head")))
    assert_close(loss(model, batch), plain, rtol=1e-6)


def test_a_masked_vocabulary_gives_no_nan() -> None:
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 3] = -torch.inf
    loss, targets = SureCrossEntropy(CrossEntropy(), 0.3, 1.5), (torch.tensor([0, 1, 2, 4, 6]),)
    given = z.clone().requires_grad_()
    want = loss.plain(given, targets)
    (gradient,) = torch.autograd.grad(want.sum(), given)
    assert_close(loss.in_place(z, slice(0, 5), targets, True), want)
    assert z.isfinite().all()
    assert_close(z, gradient)


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_it_holds_as_many_buffers_as_it_says(softcap: float | None) -> None:
    n, wide = 13, 4999
    z = torch.randn(n, wide, generator=torch.Generator().manual_seed(0))
    loss = SureCrossEntropy(CrossEntropy(softcap=softcap, logit_scale=0.7), 0.3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.in_place(z, slice(0, n), (torch.zeros(n, dtype=torch.long),), True)
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    assert loss.buffers - 1 < 1 + max(held) / (n * wide * 4) <= loss.buffers + 0.1


def test_bad_input_is_named() -> None:
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be a finite number, 0 or more"):
            ConfidencePenaltyLoss(strength=strength)
    for threshold in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="threshold must be a finite number larger than 0, or None"):
            ConfidencePenaltyLoss(strength=1.0, threshold=threshold)
    with pytest.raises(TypeError, match="the loss must be causal_lm_loss, masked_lm_loss"):
        ConfidencePenaltyLoss(F.cross_entropy, strength=1.0)
    with pytest.raises(ValueError, match=r"expected logits \[\.\.\., V\]; got a scalar"):
        confidence_penalty(torch.tensor(1.0))
    with pytest.raises(ValueError, match="mask must be booleans"):
        confidence_penalty(torch.zeros(5, 3), mask=torch.ones(5))
    with pytest.raises(ValueError, match="the mask leaves none of 5"):
        confidence_penalty(torch.zeros(5, 3), mask=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction must be"):
        confidence_penalty(torch.zeros(5, 3), reduction="max")
    batch = {"input_ids": torch.tensor([[5, 7]]), "labels": torch.tensor([0.5])}
    with pytest.raises(ValueError, match="needs integer labels"):
        ConfidencePenaltyLoss(classification_loss, strength=1.0)(tiny_bert(labels=2), batch)
