from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmtune.losses.divergence import kl_divergence
from llmtune.losses.top_k import top_k_kl_divergence, top_k_log_probabilities
from llmtune.testing.close import assert_close

V = 23


def logits(*shape: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = scale * torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def test_the_stored_values_are_the_largest_of_the_softened_distribution() -> None:
    _, teacher = logits(3, 5, V)
    values, indices = top_k_log_probabilities(teacher.requires_grad_(), 7, temperature=2.5)
    assert values.shape == indices.shape == (3, 5, 7)
    assert not values.requires_grad
    everything = (teacher / 2.5).softmax(-1).log().sort(-1, descending=True)
    assert_close(values, everything.values[..., :7])
    assert torch.equal(indices, everything.indices[..., :7])
    assert top_k_log_probabilities(teacher.bfloat16(), 2)[0].dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equal_to_the_full_divergence_with_all_classes_and_below_it_with_fewer(temperature: float) -> None:
    student, teacher = logits(11, V)
    full = kl_divergence(student, teacher, temperature=temperature, reduction="none")
    before = torch.zeros(11, dtype=torch.float64)
    for k in range(1, V + 1):
        stored = top_k_log_probabilities(teacher, k, temperature=temperature)
        rows = top_k_kl_divergence(student, *stored, temperature=temperature, reduction="none")
        assert (rows >= before - 1e-12).all()  # each class taken out of the rest tells more
        assert (rows <= full + 1e-12).all()
        before = rows
    assert_close(before, full)
    for ours, want in zip(
        torch.autograd.grad(before.sum(), student), torch.autograd.grad(full.sum(), student), strict=True
    ):
        assert_close(ours, want)


def test_the_bucket_keeps_the_students_shares_and_moves_their_sum() -> None:
    """Gradient q - p at the top k; at another class q (1 - P / Q)."""
    student, teacher = logits(V)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    values, index = top_k_log_probabilities(teacher, 5)
    (grad,) = torch.autograd.grad(top_k_kl_divergence(student, values, index), student)
    rest = torch.ones(V, dtype=torch.bool).index_fill(0, index, False)
    want = torch.where(rest, q * (1 - p[rest].sum() / q[rest].sum()), q - p)
    assert_close(grad, want)


def test_without_the_tail_both_sides_are_distributions_over_the_top() -> None:
    student, teacher = logits(11, V)
    values, index = top_k_log_probabilities(teacher, 5)
    loss = top_k_kl_divergence(student, values, index, tail=False)
    assert_close(loss, kl_divergence(student.gather(-1, index), teacher.gather(-1, index)))
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad.scatter(-1, index, 0.0).any()  # the others learn nothing
    far = student.detach().scatter_add(-1, index, torch.full_like(values, -50.0))
    assert_close(top_k_kl_divergence(far, values, index, tail=False), loss)  # and their weight costs nothing


def test_zero_where_both_agree() -> None:
    student, _ = logits(11, V)
    for k in (1, 5, V):
        loss = top_k_kl_divergence(student, *top_k_log_probabilities(student, k))
        assert 0 <= loss < 1e-14
        assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sure_teacher_leaves_finite_gradients(dtype: torch.dtype) -> None:
    """The mass of the top k is 1 to rounding, on either side or both."""
    teacher = torch.tensor([[90.0, 0, 0, 0, 0], [40, 0, 0, 0, 0], [17, 16, 0, 0, 0]], dtype=dtype)
    for student in (teacher.clone(), torch.zeros_like(teacher), -teacher, teacher.flip(-1)):
        student.requires_grad_()
        for k in (1, 2, 5):
            rows = top_k_kl_divergence(student, *top_k_log_probabilities(teacher, k), reduction="none")
            (grad,) = torch.autograd.grad(rows.sum(), student)
            assert rows.isfinite().all()
            assert (rows >= 0).all()
            assert grad.isfinite().all()
    exact = kl_divergence(torch.zeros_like(teacher), teacher, reduction="none")
    ours = top_k_kl_divergence(torch.zeros_like(teacher), *top_k_log_probabilities(teacher, 2), reduction="none")
    assert_close(ours, exact, rtol=1e-4)


def test_a_masked_vocabulary_gives_no_nan() -> None:
    student, teacher = logits(11, V)
    gone = torch.arange(V) % 3 == 0
    student, teacher = (x.detach().masked_fill(gone, -torch.inf) for x in (student, teacher))
    student.requires_grad_()
    for k in (5, int((~gone).sum()), V):  # the last stores classes of probability 0
        loss = top_k_kl_divergence(student, *top_k_log_probabilities(teacher, k))
        (grad,) = torch.autograd.grad(loss, student)
        assert grad.isfinite().all()
        assert loss.isfinite()
    assert_close(loss, kl_divergence(student, teacher))


def test_a_student_that_leaves_nothing_to_the_rest_is_infinitely_far_and_gives_no_nan() -> None:
    student, teacher = logits(3, V)
    values, index = top_k_log_probabilities(teacher, 4)
    alone = student.detach().clone()
    alone[1] = torch.full((V,), -torch.inf, dtype=torch.float64).scatter(0, index[1], 0.0)
    rows = top_k_kl_divergence(alone.requires_grad_(), values, index, reduction="none")
    assert rows.isinf().tolist() == [False, True, False]
    assert torch.autograd.grad(rows.sum(), alone)[0].isfinite().all()


def test_a_mass_a_little_above_one_is_rounding() -> None:
    values = torch.tensor([[0.5, 0.5 + 1e-6]]).log()
    student = torch.zeros(1, 3, requires_grad=True)
    loss = top_k_kl_divergence(student, values, torch.tensor([[0, 2]]))
    assert abs(loss.item() - torch.tensor(1.5).log().item()) < 1e-5
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_masked_rows_change_nothing_even_by_nan_or_wrong_indices() -> None:
    student, teacher = logits(3, 5, V)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    values, index = top_k_log_probabilities(teacher, 4)
    clean = top_k_kl_divergence(student, values, index, reduction="none")
    spoilt = student.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    values = values.masked_fill(~mask[..., None], torch.nan)
    index = index.masked_fill(~mask[..., None], -1)
    loss = top_k_kl_divergence(spoilt, values, index, mask=mask)
    assert_close(loss, clean[mask].mean())
    assert not torch.autograd.grad(loss, spoilt)[0][~mask].any()
    per_row = top_k_kl_divergence(spoilt, values, index, mask=mask, reduction="none")
    assert_close(per_row, torch.where(mask, clean, 0.0))


def test_bad_input_is_named() -> None:
    student, teacher = logits(3, V)
    values, index = top_k_log_probabilities(teacher, 4)
    for k in (0, V + 1):
        with pytest.raises(ValueError, match=f"k must be between 1 and the vocabulary's size 23; got {k}"):
            top_k_log_probabilities(teacher, k)
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature must be a finite number larger than 0"):
            top_k_log_probabilities(teacher, 4, temperature=temperature)
        with pytest.raises(ValueError, match="temperature must be a finite number larger than 0"):
            top_k_kl_divergence(student, values, index, temperature=temperature)
    with pytest.raises(ValueError, match=r"got \[3, 23\], \[3, 3\] and \[3, 4\]"):
        top_k_kl_divergence(student, values[:, 1:], index)
    with pytest.raises(TypeError, match=r"teacher_indices must be integers; got torch\.float64"):
        top_k_kl_divergence(student, values, index.double())
    with pytest.raises(ValueError, match=r"between 1 and V = 3 classes a row; got 4"):
        top_k_kl_divergence(student[:, :3], values, index)
    with pytest.raises(ValueError, match=r"teacher_indices must be in 0 \.\.\. 22; got 0 \.\.\. 23"):
        top_k_kl_divergence(student, values, torch.tensor([[0, 1, 2, V]] * 3))
    with pytest.raises(ValueError, match="name a class twice in one row"):
        top_k_kl_divergence(student, values, torch.tensor([[0, 1, 2, 1]] * 3))
    with pytest.raises(ValueError, match=r"at most 1 in sum; a row sums to .*Make them with top_k_log_probabilities"):
        top_k_kl_divergence(student, teacher.topk(4).values, index)
    with pytest.raises(ValueError, match="the mask leaves none of 3"):
        top_k_kl_divergence(student, values, index, mask=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction must be"):
        top_k_kl_divergence(student, values, index, reduction="max")
