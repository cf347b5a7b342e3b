from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.attach import active, attach, disabled
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.data.preferences import collate_preferences
from llmtune.losses.preference import DPOLoss, dpo_loss
from llmtune.losses.sequence import sequence_log_probabilities
from llmtune.testing.close import assert_close
from llmtune.testing.loop import check_loop
from llmtune.testing.models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import LossFunction


def pairs(count: int = 3, *, seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose prompts and answers all differ in length."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()

    return [{"prompt": ids(2 + k % 3), "chosen": ids(3 + k), "rejected": ids(2 + (2 * k) % 5)} for k in range(count)]


def adapted(make: Any, *targets: str, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    model = make()
    attach(model, LoRA(rank=3, alpha=6, targets=list(targets), dropout=dropout))
    return moved(model, seed=seed)


def answer_log_probability(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt) from full logits, a row by itself."""
    log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) + t - 1, token] for t, token in enumerate(answer))


def plain_dpo(model: nn.Module, given: list[dict[str, Any]], beta: float) -> Tensor:
    losses = []
    for pair in given:
        with torch.no_grad(), disabled(model):
            before = [answer_log_probability(model, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        now = [answer_log_probability(model, pair["prompt"], pair[side]) for side in ("chosen", "rejected")]
        h = (now[0] - before[0]) - (now[1] - before[1])
        losses.append(torch.log(1 + torch.exp(-beta * h)))
    return sum(losses) / len(losses)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_closed_forms() -> None:
    given = (numbers(-3.0, -7.0), numbers(-5.0, -6.0), numbers(-4.0, -6.0), numbers(-4.5, -6.0))
    h = numbers(1.0 + 0.5, -1.0)
    expected = torch.log(1 + torch.exp(-0.3 * h))
    assert_close(dpo_loss(*given, beta=0.3, reduction="none"), expected, rtol=1e-12)
    assert_close(dpo_loss(*given, beta=0.3), expected.mean(), rtol=1e-12)
    assert_close(dpo_loss(*given, beta=0.3, reduction="sum"), expected.sum(), rtol=1e-12)
    smooth = 0.8 * expected + 0.2 * torch.log(1 + torch.exp(0.3 * h))
    assert_close(dpo_loss(*given, beta=0.3, label_smoothing=0.2, reduction="none"), smooth, rtol=1e-12)
    assert_close(dpo_loss(*given, beta=0.3, kind="ipo", reduction="none"), (h - 1 / 0.6) ** 2, rtol=1e-12)


def test_without_a_margin_the_loss_is_log_2_and_the_gradient_half_beta() -> None:
    zero = numbers(-3.0, -5.0, -7.0)
    policy = [zero.clone().requires_grad_() for _ in range(2)]
    loss = dpo_loss(*policy, zero, zero, beta=0.3, reduction="sum")
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-12)
    up, down = torch.autograd.grad(loss, policy)
    assert_close(up, torch.full_like(up, -0.15), rtol=1e-12)
    assert_close(down, torch.full_like(up, 0.15), rtol=1e-12)
    ipo = dpo_loss(*policy, zero, zero, beta=0.3, kind="ipo", reduction="sum")
    up, _ = torch.autograd.grad(ipo, policy)
    assert_close(up, torch.full_like(up, -1 / 0.3), rtol=1e-12)


def test_smoothing_and_ipo_have_a_best_gap_and_plain_dpo_has_none() -> None:
    def slope(gap: float, **options: Any) -> float:
        h = numbers(gap).requires_grad_()
        return torch.autograd.grad(dpo_loss(h, 0 * h, 0 * h.detach(), 0 * h.detach(), beta=0.5, **options), h)[0].item()

    assert slope(math.log(0.9 / 0.1) / 0.5, label_smoothing=0.1) == pytest.approx(0.0, abs=1e-12)
    assert slope(1.0, kind="ipo") == pytest.approx(0.0, abs=1e-12)
    assert slope(2.0, kind="ipo") > 0 > slope(2.0)


def test_a_large_margin_stays_finite_in_float32() -> None:
    far = torch.tensor([-4000.0], requires_grad=True)
    loss = dpo_loss(far, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=1.0)
    assert loss.item() == 4000.0
    assert torch.autograd.grad(loss, far)[0].item() == -1.0


CASES = {
    "llama": (tiny_llama, ("q_proj", "down_proj")),
    "llama, adapted head": (tiny_llama, ("q_proj", "lm_head")),
    "gpt2": (tiny_gpt2, ("c_attn", "c_fc")),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_plain_computation_from_full_logits(name: str, side: Any) -> None:
    make, targets = CASES[name]
    model, given = adapted(make, *targets).double(), pairs()
    batch = collate_preferences(given, side=side)
    if side == "left":  # GPT-2's learned positions need to be told where a text begins
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    loss, parts = DPOLoss(beta=0.7, reference=disabled)(model, batch)
    expected = plain_dpo(model, given, 0.7)
    assert_close(loss, expected, rtol=1e-10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for ours, own in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert_close(ours, own, rtol=1e-8)
    assert parts["reward_margin"].item() == pytest.approx((parts["reward_chosen"] - parts["reward_rejected"]).item())
    assert not any(part.requires_grad for part in parts.values())


def test_the_parts_are_means_over_pairs() -> None:
    model, given = adapted(tiny_llama, "q_proj", "up_proj"), pairs(5)
    batch = collate_preferences(given)
    loss, parts = DPOLoss(beta=0.5, reference=disabled)(model, batch)
    inputs = {name: value for name, value in batch.items() if name != "chosen"}
    with torch.no_grad():
        now = sequence_log_probabilities(model, inputs)
        with disabled(model):
            gain = 0.5 * (now - sequence_log_probabilities(model, inputs))
    assert_close(parts["reward_chosen"], gain[::2].mean(), rtol=1e-5)
    assert_close(parts["reward_rejected"], gain[1::2].mean(), rtol=1e-5)
    assert_close(parts["reward_accuracy"], (gain[::2] > gain[1::2]).float().mean())
    assert 0 < parts["reward_accuracy"] < 1
    assert_close(loss, -F.logsigmoid(gain[::2] - gain[1::2]).mean(), rtol=1e-5)


def test_per_token_divides_by_the_number_of_labels() -> None:
    model, given = adapted(tiny_llama, "q_proj").double(), pairs()
    batch = collate_preferences(given)
    inputs = {name: value for name, value in batch.items() if name != "chosen"}
    lengths = torch.tensor([len(pair[side]) for pair in given for side in ("chosen", "rejected")])
    with disabled(model):
        before = sequence_log_probabilities(model, inputs) / lengths
    gain = sequence_log_probabilities(model, inputs) / lengths - before
    expected = (gain[::2] - gain[1::2] - 1 / 0.2).square().mean()
    loss, _ = DPOLoss(kind="ipo", per_token=True, reference=disabled)(model, batch)
    assert_close(loss, expected, rtol=1e-10)
    whole, _ = DPOLoss(kind="ipo", reference=disabled)(model, batch)
    assert abs(whole - loss) > 1e-3


def test_numbers_of_a_reference_made_before_do_the_same() -> None:
    model, given = adapted(tiny_gpt2, "c_attn"), pairs(4)
    batch = collate_preferences(given)
    inputs = {name: value for name, value in batch.items() if name != "chosen"}
    with torch.no_grad(), disabled(model):
        before = sequence_log_probabilities(model, inputs)
    numbered = [
        {**pair, "reference_chosen": before[2 * k].item(), "reference_rejected": before[2 * k + 1].item()}
        for k, pair in enumerate(given)
    ]
    ours, parts = DPOLoss()(model, collate_preferences(numbered))
    other, other_parts = DPOLoss(reference=disabled)(model, batch)
    assert_close(ours, other, rtol=1e-6)
    assert parts.keys() == other_parts.keys()


def test_another_adapter_may_be_the_reference() -> None:
    model, batch = tiny_llama().double(), collate_preferences(pairs())
    attach(model, LoRA(rank=2, alpha=4, targets=["q_proj"]), name="first")
    moved(model)
    attach(model, LoRA(rank=2, alpha=4, targets=["v_proj"]), name="second")
    loss, _ = DPOLoss(reference=lambda m: active(m, ["first"]))(model, batch)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    loss, _ = DPOLoss(reference=disabled)(model, batch)
    assert abs(loss.item() - math.log(2)) > 1e-4


def test_the_reference_sees_no_dropout_and_leaves_no_trace() -> None:
    model, batch = adapted(partial(tiny_gpt2, dropout=0.3), "c_attn", dropout=0.3), collate_preferences(pairs())
    inputs = {name: value for name, value in batch.items() if name != "chosen"}

    def draws(*_: Any) -> None:
        torch.rand(3)

    model.train()
    model.transformer.h[0].mlp.eval()
    model.transformer.ln_f.register_forward_hook(draws)  # draws in eval mode too
    modes = [module.training for module in model.modules()]
    torch.manual_seed(0)
    policy = sequence_log_probabilities(model, inputs)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    loss, _ = DPOLoss(reference=disabled)(model, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    with disabled(model):
        before = sequence_log_probabilities(model, inputs)
    margin = (policy - before)[::2] - (policy - before)[1::2]
    assert_close(loss, -F.logsigmoid(0.1 * margin).mean(), rtol=1e-6)


def test_an_encoder_decoder() -> None:
    model = adapted(tiny_t5, "q", "wi").double()
    rows = [
        {side: {"input_ids": pair["prompt"], "labels": pair[side]} for side in ("chosen", "rejected")}
        for pair in pairs()
    ]
    batch = collate_preferences(rows)
    loss, _ = DPOLoss(beta=0.5, reference=disabled)(model, batch)

    def each() -> Tensor:
        singles = [row[side] for row in rows for side in ("chosen", "rejected")]
        return torch.stack([-model(**collate_padded([one])).loss * len(one["labels"]) for one in singles])

    now = each()
    with disabled(model):
        gain = now - each()
    assert_close(loss, -F.logsigmoid(0.5 * (gain[::2] - gain[1::2])).mean(), rtol=1e-9)


def test_under_bfloat16() -> None:
    model, batch = adapted(tiny_llama, "q_proj", "up_proj"), collate_preferences(pairs())
    expected, _ = DPOLoss(reference=disabled)(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = DPOLoss(reference=disabled)(model, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_close(loss, expected, rtol=0.05)


def test_however_a_step_is_cut_the_gradient_is_one() -> None:
    def make(model: nn.Module, data: Any, size: int) -> TrainingLoop:
        settings = LoopSettings(max_steps=1, rows_per_step=8, rows_per_micro_batch=size, progress=False)
        return TrainingLoop(
            model, data, settings=settings, collate=collate_preferences, loss=DPOLoss(beta=0.7, reference=disabled)
        )

    check_loop(make, model=adapted(tiny_llama, "q_proj", "down_proj"), rows=pairs(8))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_training_makes_the_margin_grow(kind: Any) -> None:
    model = tiny_gpt2()
    attach(model, LoRA(rank=4, alpha=8, targets=["c_attn", "c_fc"]))
    settings = LoopSettings(
        max_steps=12, rows_per_step=8, learning_rate=5e-3, schedule="constant", clip_norm=None, progress=False
    )
    loss = DPOLoss(kind=kind, reference=disabled)
    loop = TrainingLoop(model, pairs(8), settings=settings, collate=collate_preferences, loss=loss)
    history = loop.fit()
    assert history[0]["loss"] == pytest.approx(math.log(2) if kind == "sigmoid" else 25.0, rel=1e-4)
    assert history[0]["reward_margin"] == pytest.approx(0.0, abs=1e-5)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert history[-1]["reward_margin"] > 0.2
    assert history[-1]["reward_accuracy"] > 0.9
    assert history[-1]["targets"] == 8


def test_the_protocol() -> None:
    batch = collate_preferences(pairs(5))
    assert isinstance(DPOLoss(), LossFunction)
    assert DPOLoss().count_targets(batch) == 5
    with pytest.raises(AttributeError):
        DPOLoss().beta = 0.2


ONE = torch.zeros(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be a finite number larger than 0; got 0.0"),
        ({"beta": math.inf}, "beta must be a finite number larger than 0; got inf"),
        ({"kind": "hinge"}, 'kind must be "sigmoid" or "ipo"; got \'hinge\''),
        ({"label_smoothing": 0.5}, "label_smoothing must be 0 or more and below 0.5; got 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, 'label_smoothing has no effect on kind="ipo"'),
    ],
)
def test_options_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpo_loss(ONE, ONE, ONE, ONE, **options)
    with pytest.raises(ValueError, match=message):
        DPOLoss(**options)


def test_tensors_are_checked() -> None:
    with pytest.raises(ValueError, match=r"log-probabilities \[B\], one a pair; got shapes \[1\], \[2\], \[1\], \[1\]"):
        dpo_loss(ONE, torch.zeros(2), ONE, ONE)
    with pytest.raises(ValueError, match=r"the mean needs at least one pair; got none"):
        dpo_loss(*[torch.zeros(0)] * 4)
    with pytest.raises(ValueError, match=r'reduction must be "mean", "sum" or "none"; got .max'):
        dpo_loss(ONE, ONE, ONE, ONE, reduction="max")
    with pytest.raises(TypeError, match="reference must be a function that takes the model"):
        DPOLoss(reference=nullcontext())


def test_batches_are_checked() -> None:
    model, batch = adapted(tiny_llama, "q_proj"), collate_preferences(pairs(2))
    with pytest.raises(ValueError, match=r"DPO needs one reference: .*; got neither"):
        DPOLoss()(model, batch)
    two = {"reference_chosen": torch.zeros(2), "reference_rejected": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"DPO needs one reference: .*; got both"):
        DPOLoss(reference=disabled)(model, {**batch, **two})
    with pytest.raises(ValueError, match="got only one of the two numbers"):
        DPOLoss()(model, {**batch, "reference_chosen": torch.zeros(2)})
    with pytest.raises(
        ValueError, match=r'"reference_rejected" must be log-probabilities \[2\], one a pair; got torch'
    ):
        DPOLoss()(model, {**batch, **two, "reference_rejected": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"a batch of pairs is expected, .* got none. Make it by"):
        DPOLoss(reference=disabled)(model, {name: value for name, value in batch.items() if name != "chosen"})
    with pytest.raises(ValueError, match=r"in turns; got torch.bool \[4\]"):
        DPOLoss(reference=disabled)(model, {**batch, "chosen": torch.tensor([True, True, False, False])})
    with pytest.raises(ValueError, match="the model has no adapters to switch off"):
        DPOLoss(reference=disabled)(tiny_llama(), batch)
