"""Cross-entropy among a task's own classes: whose logits learn, half precision, and what it refuses."""

import math

import pytest
import torch

from llmtune.losses.own_classes import OwnClassesLoss, own_classes_cross_entropy
from llmtune.testing.models import tiny_bert

ROWS, CLASSES = 11, 7
OWN = (5, 2, 3)
TARGETS = torch.tensor([2, 3, 5, 0, 6, -100, 2, 1, 5, 3, 4])  # of own classes, of others, and none


def logits(dtype=torch.float64):
    drawn = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(dtype).requires_grad_()


def test_logits_of_other_classes_have_no_gradient_in_own_rows_whatever_stands_in_them():
    others = [c for c in range(CLASSES) if c not in OWN]
    own_rows = torch.tensor([t in OWN for t in TARGETS.tolist()])
    plain = logits()
    own_classes_cross_entropy(plain, TARGETS, OWN, reduction="sum").backward()
    assert not plain.grad[own_rows][:, others].any()
    assert plain.grad[~own_rows & (TARGETS != -100)].all()  # a replayed row is told from all
    for junk in (math.nan, math.inf, -math.inf):
        z = logits().detach()
        z[own_rows.nonzero(), torch.tensor(others)] = junk
        z[TARGETS == -100] = junk
        z.requires_grad_()
        own_classes_cross_entropy(z, TARGETS, OWN, reduction="sum").backward()
        assert torch.equal(z.grad, plain.grad)


def test_all_classes_own_is_plain_cross_entropy_and_shape_is_kept():
    z, t = logits(), TARGETS
    plain = torch.nn.functional.cross_entropy(z, t, reduction="none")
    torch.testing.assert_close(own_classes_cross_entropy(z, t, range(CLASSES), reduction="none"), plain)
    one = own_classes_cross_entropy(z[None, :, None], t[None, :, None].to(torch.int8), range(CLASSES), reduction="none")
    torch.testing.assert_close(one, plain[None, :, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    z = logits(dtype)
    found = own_classes_cross_entropy(100 * z, TARGETS, OWN)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), own_classes_cross_entropy((100 * z).double(), TARGETS, OWN))
    found.backward()
    assert z.grad.isfinite().all()


def test_no_label_at_all():
    z, none = logits(), torch.full((ROWS,), -100)
    own_classes_cross_entropy(z, none, OWN, reduction="sum").backward()
    assert not z.grad.any()
    assert own_classes_cross_entropy(z, none, OWN, reduction="none").tolist() == [0.0] * ROWS
    with pytest.raises(ValueError, match="all 11 are ignored"):
        own_classes_cross_entropy(z, none, OWN)


def test_labels_of_rows_and_of_tokens():
    batch = {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1]]), "labels": torch.tensor([2, -100])}
    model = tiny_bert(labels=5).eval()
    row = model(input_ids=batch["input_ids"]).logits[0]
    torch.testing.assert_close(OwnClassesLoss((2, 4))(model, batch), row[[2, 4]].logsumexp(0) - row[2])
    assert OwnClassesLoss((2, 4)).count_targets(batch) == 1


@pytest.mark.parametrize(("change", "error", "words"), [
    ({"own": (2,)}, ValueError, r"two or more different classes of 0 to 6; got \[2\]"),
    ({"own": (2, 2)}, ValueError, "two or more different"),
    ({"own": (torch.tensor(2), torch.tensor(2))}, ValueError, r"got \[2, 2\]"),
    ({"own": (2, 7)}, ValueError, "of 0 to 6"),
    ({"own": (-1, 2)}, ValueError, "of 0 to 6"),
    ({"own": (0.5, 2)}, TypeError, "whole ones; got"),
    ({"targets": TARGETS[:3]}, ValueError, r"logits \[..., C\] and targets"),
    ({"targets": TARGETS + 1}, ValueError, "0 ... 6"),
    ({"targets": TARGETS.float()}, TypeError, "targets must be integers"),
    ({"reduction": "avg"}, ValueError, "reduction must be"),
])  # fmt: skip
def test_bad_input_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        own_classes_cross_entropy(**({"logits": logits(), "targets": TARGETS, "own": OWN} | change))


@pytest.mark.parametrize("own", [(1,), (1, 1), (-1, 1), (1.0, 2.0)])
def test_classes_of_the_record_are_checked(own):
    with pytest.raises((ValueError, TypeError), match="own must be"):
        OwnClassesLoss(own)
