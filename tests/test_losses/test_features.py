from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.features import FeatureDistillationLoss, feature_distillation_loss
from llmtune.losses.head import hidden_before_head
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_llama, tiny_t5
from llmtune.types import LossFunction


def features(E: int = 7, E2: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student = torch.randn(3, 5, E, generator=generator, dtype=torch.float64, requires_grad=True)
    return student, torch.randn(3, 5, E2, generator=generator, dtype=torch.float64, requires_grad=True)


def test_closed_forms() -> None:
    student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]])
    assert feature_distillation_loss(student, teacher).item() == 10.0  # (4 + 16) / 2
    assert abs(feature_distillation_loss(student, teacher, kind="cosine").item() - 0.4) < 1e-6  # 1 - 15 / 25
    assert abs(feature_distillation_loss(student, -student, kind="cosine").item() - 2.0) < 1e-6


def test_the_mean_is_over_the_rows_that_count_and_padding_changes_nothing() -> None:
    student, teacher = features()
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    rows = (student - teacher).square().mean(-1)
    spoilt = student.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    loss = feature_distillation_loss(spoilt, teacher, mask=mask)
    assert_close(loss, rows[mask].mean())
    assert abs(F.mse_loss(student, teacher) - loss) > 1e-3  # torch's mean takes the padding in
    assert not torch.autograd.grad(loss, spoilt)[0][~mask].any()
    assert_close(feature_distillation_loss(spoilt, teacher, mask=mask, reduction="sum"), rows[mask].sum())
    per_row = feature_distillation_loss(spoilt, teacher, mask=mask, reduction="none")
    assert_close(per_row, torch.where(mask, rows, 0.0))


def test_the_cosine_is_torchs() -> None:
    student, teacher = features()
    ours = feature_distillation_loss(student, teacher, kind="cosine")
    theirs = (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()
    assert_close(ours, theirs)
    (grad,), (want,) = (torch.autograd.grad(x, student) for x in (ours, theirs))
    assert_close(grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_exactly_zero_with_a_gradient_of_exactly_zero_at_equality(kind: str, dtype: torch.dtype) -> None:
    student = features()[0].detach().to(dtype).requires_grad_()
    loss = feature_distillation_loss(student, student.detach(), kind=kind)
    assert loss.dtype == torch.float32
    assert loss == 0
    assert not torch.autograd.grad(loss, student)[0].any()


def test_a_row_of_zeros_has_no_direction_and_finite_gradients() -> None:
    student = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    rows = feature_distillation_loss(student, teacher, kind="cosine", reduction="none")
    assert_close(rows, torch.tensor([0.5, 0.0, 0.5]))
    assert torch.autograd.grad(rows.sum(), student)[0].abs().max() <= 1


def test_only_the_student_and_the_projection_learn() -> None:
    student, teacher = features(7, 11)
    projection = nn.Linear(7, 11, dtype=torch.float64)
    loss = feature_distillation_loss(student, teacher, projection=projection)
    assert_close(loss, F.mse_loss(F.linear(student, projection.weight, projection.bias), teacher))
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert projection.weight.grad is not None
    assert torch.autograd.gradgradcheck(
        lambda s: feature_distillation_loss(s, teacher, projection=projection, kind="cosine"), student
    )


def test_the_projection_sees_the_rows_that_count_alone() -> None:
    student, teacher = features(7, 11)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    seen = []

    def projection(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return F.pad(x, (0, 4))

    feature_distillation_loss(student, teacher, mask=mask, projection=projection)
    assert seen == [(10, 7)]


CASES = {
    "causal": (tiny_llama, causal_lm_loss),
    "masked": (tiny_bert, masked_lm_loss),
    "sequence to sequence": (tiny_t5, sequence_to_sequence_loss),
}


def moved(make: Any, seed: int = 1) -> nn.Module:
    model, generator = make(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_batch(name: str) -> None:
    make, inner = CASES[name]
    model, teacher = make(), moved(make)
    labels = torch.tensor([[5, -100, 11, 3], [13, 17, -100, 19]])
    batch = {"input_ids": torch.tensor([[5, 7, 11, 3], [13, 17, 6, 19]]), "labels": labels}
    loss = FeatureDistillationLoss(teacher, inner, strength=0.7)
    assert isinstance(loss, LossFunction)
    assert loss.count_targets(batch) == inner.count_targets(batch)
    total, parts = loss(model, batch)
    given = batch
    if name == "sequence to sequence":
        given = {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    (student, _), (wanted, _) = hidden_before_head(model, given), hidden_before_head(teacher, given)
    if name == "causal":
        student, wanted, labels = student[:, :-1], wanted[:, :-1], labels[:, 1:]
    distance = F.mse_loss(student[labels != -100], wanted[labels != -100])
    assert_close(parts["feature_distillation"], distance)
    assert_close(parts["task_loss"], inner(model, batch))
    assert_close(total, inner(model, batch) + 0.7 * distance)
    total.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_packed_and_padded_rows_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 11, 3)]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in rows]
    loss, model = FeatureDistillationLoss(moved(tiny_llama), strength=0.7, kind="cosine"), tiny_llama()
    assert_close(loss(model, collate_packed(rows))[0], loss(model, collate_padded(rows))[0])


def test_the_teacher_runs_in_eval_mode_and_leaves_no_trace() -> None:
    model, teacher = tiny_llama(), moved(tiny_llama)
    teacher.train()
    modes, seen = [], []
    teacher.register_forward_hook(
        lambda m, args, out: (modes.append(m.training), seen.append(torch.is_grad_enabled()), torch.rand(3))
    )
    ids = torch.tensor([[5, 7, 11, 13]])
    state = torch.get_rng_state()
    FeatureDistillationLoss(teacher, strength=1.0)(model, {"input_ids": ids, "labels": ids})
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [False]
    assert seen == [False]
    assert teacher.training


def test_a_projection_must_be_part_of_the_model() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
    batch, width = {"input_ids": ids, "labels": ids}, model.config.hidden_size
    projection = nn.Linear(width, width)
    loss = FeatureDistillationLoss(moved(tiny_llama), strength=1.0, projection=projection)
    with pytest.raises(ValueError, match=r"the projection is no part of the model.*register it"):
        loss(model, batch)
    model.projection = projection
    loss(model, batch)[0].backward()
    assert projection.weight.grad.abs().max() > 0
    projection.requires_grad_(False)
    loss(tiny_llama(), batch)  # frozen, it may stand anywhere


def test_bad_input_is_named() -> None:
    student, teacher = features(7, 11)
    with pytest.raises(ValueError, match=r"wide as the teacher's; got 7 and 11: give a projection, .*\(7, 11\)"):
        feature_distillation_loss(student, teacher)
    with pytest.raises(ValueError, match="the projection of the student's features"):
        feature_distillation_loss(student, teacher, projection=nn.Linear(7, 13, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the same rows; got \[3, 5, 7\] and \[2, 5, 11\]"):
        feature_distillation_loss(student, teacher[1:])
    with pytest.raises(ValueError, match='kind must be "mse" or "cosine"; got \'l1\''):
        feature_distillation_loss(student, student, kind="l1")
    with pytest.raises(ValueError, match="reduction must be"):
        feature_distillation_loss(student, student, reduction="max")
    with pytest.raises(ValueError, match="the mask leaves none of 15"):
        feature_distillation_loss(student, student, mask=torch.zeros(3, 5, dtype=torch.bool))
    model = tiny_llama()
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="strength must be a finite number, 0 or more"):
            FeatureDistillationLoss(model, strength=strength)
    with pytest.raises(ValueError, match="kind must be"):
        FeatureDistillationLoss(model, strength=1.0, kind="l1")
    with pytest.raises(TypeError, match="the teacher must be a model"):
        FeatureDistillationLoss("llama", strength=1.0)
    with pytest.raises(TypeError, match="the loss must be causal_lm_loss, masked_lm_loss or sequence_to_sequence_loss"):
        FeatureDistillationLoss(model, classification_loss, strength=1.0)


def test_strength_zero_is_the_loss_with_its_options() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 7, 11, 13]])
    batch, smooth = {"input_ids": ids, "labels": ids}, CausalLMLoss(label_smoothing=0.1, z_loss=0.01)
    total, parts = FeatureDistillationLoss(model, smooth, strength=0.0)(model, batch)
    assert total == parts["task_loss"] == smooth(model, batch)
