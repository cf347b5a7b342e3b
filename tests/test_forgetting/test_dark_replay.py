import pytest
import torch
from references import (
    CASES,
    CLASSES,
    OF_TOKENS,
    ROWS,
    assert_same_gradients,
    cross_entropies,
    gradients,
    logits_at_targets,
)
from torch.nn import functional as F

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.data.replay import ReplayBuffer
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.dark_replay import DERLoss, squared_logit_distance
from llmtune.losses.causal_lm import CausalLMLoss
from llmtune.losses.classification import ClassificationLoss, classification_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_llama
from llmtune.training import LoopSettings, TrainingLoop


def batches(case, *, k=97):
    """Return (student, a batch of two new and two replayed rows, [m] which targets are replayed, loss, teacher)."""
    make, rows, collate, loss = CASES[case]
    teacher = make(1)
    old = with_teacher(rows[2:4], teacher, **({} if case == "classifier" else {"k": k}))
    mixed = MixedBatches(rows[:2], old, 0.5, unit=lambda row: 1)
    batch = collate([mixed[at] for at in range(4)])
    counts = [
        logits_at_targets(teacher, collate_padded([row]), loss)[0].shape[0] for row in (mixed[at] for at in range(4))
    ]
    return make(), batch, torch.arange(4).repeat_interleave(torch.tensor(counts)) >= 2, loss, teacher


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_a_classifier_by_the_formula(beta):
    student, batch, old, loss, teacher = batches("classifier")
    total, parts = DERLoss(loss, alpha=0.3, beta=beta)(student, batch)
    found = gradients(student, total)
    with torch.no_grad():
        kept, _ = logits_at_targets(teacher, batch, loss)
    logits, targets = logits_at_targets(student, batch, loss)
    cost = cross_entropies(logits, targets)
    distance = ((logits - kept) ** 2).sum(1)
    assert 0 < int(old.sum()) < len(old)
    expected = (cost[~old].sum() + 0.3 * distance[old].sum() + beta * cost[old].sum()) / len(targets)
    assert_close(total.detach().double(), expected.detach(), rtol=1e-5)
    assert_same_gradients(found, gradients(student, expected.float()))
    assert_close(parts["distillation"].double(), distance[old].sum().detach() / len(targets), rtol=1e-5)
    assert_close(parts["replay_loss"].double(), cost[old].sum().detach() / len(targets), rtol=1e-5)
    assert_close(parts["task_loss"].double(), cost[~old].sum().detach() / len(targets), rtol=1e-5)


@pytest.mark.parametrize("case", OF_TOKENS)
@pytest.mark.parametrize("k", [97, 3])
def test_language_models_by_the_formula(case, k):
    student, batch, old, loss, teacher = batches(case, k=k)
    total, _ = DERLoss(loss, alpha=0.3, beta=0.6)(student, batch)
    found = gradients(student, total)
    with torch.no_grad():
        p = logits_at_targets(teacher, batch, loss)[0].softmax(-1)
    logits, targets = logits_at_targets(student, batch, loss)
    order = p.argsort(-1, descending=True)
    p, q = p.gather(1, order), logits.softmax(-1).gather(1, order)
    if k < 97:
        p, q = (torch.cat([x[:, :k], x[:, k:].sum(-1, keepdim=True)], -1) for x in (p, q))
    distance, cost = (p * (p / q).log()).sum(-1), cross_entropies(logits, targets)
    expected = (cost[~old].sum() + 0.3 * distance[old].sum() + 0.6 * cost[old].sum()) / len(targets)
    assert_close(total.detach().double(), expected.detach(), rtol=1e-4)
    assert_same_gradients(found, gradients(student, expected.float()))


def test_the_factors_of_the_paper_and_of_mammoth():
    """The paper: mean over new + alpha * mean over old; mammoth's distance is divided by the number of classes."""
    student, batch, old, loss, teacher = batches("classifier")
    r = float(old.double().mean())
    with torch.no_grad():
        total, _ = DERLoss(loss, alpha=0.5)(student, batch)
        kept, _ = logits_at_targets(teacher, batch, loss)
        logits, targets = logits_at_targets(student, batch, loss)
        new = cross_entropies(logits, targets)[~old].mean()
        alpha = 0.5 * r / (1 - r)
        paper = new + alpha * ((logits - kept) ** 2).sum(1)[old].mean()
        mammoth = new + 3 * alpha * F.mse_loss(logits[old], kept[old])
    assert_close(total.double(), (1 - r) * paper, rtol=1e-5)
    assert_close(total.double(), (1 - r) * mammoth, rtol=1e-5)


def test_squared_distance_of_the_kept_classes():
    student = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], requires_grad=True)
    nan = torch.nan
    value = squared_logit_distance(student, torch.tensor([[0.0, nan], [1.0, 1.0], [nan, nan]]))
    assert value.item() == 1 + 9 + 16
    (slope,) = torch.autograd.grad(value, student)
    assert slope.tolist() == [[2.0, 0.0, 0.0], [6.0, 8.0, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="of 4 classes, and the model has only 3"):
        squared_logit_distance(student.detach(), torch.zeros(3, 4))


def test_only_new_rows_are_the_loss_itself_and_only_old_ones_have_no_labels():
    make, rows, collate, loss = CASES["llama packed"]
    student, teacher = make(), make(1)
    old = with_teacher(rows[2:4], teacher, k=9)
    mixed = MixedBatches(rows[:2], old, 0.5)
    der = DERLoss(loss, alpha=1.0)
    new = collate([mixed[0], mixed[1]])
    assert der(student, new)[0].item() == pytest.approx(loss(student, collate(rows[:2])).item(), rel=1e-6)
    flipped = [{**row, "labels": [label if label == -100 else 3 for label in row["labels"]]} for row in old]
    assert der(student, collate(old))[0].item() == der(student, collate(flipped))[0].item()
    assert der(teacher, collate(old))[0].item() < 1e-5


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_batches_add_up(collate):
    old = with_teacher(ROWS[2:], tiny_llama(1), k=5)
    mixed = MixedBatches(ROWS[:2], old, 0.5)
    rows = [mixed[at] for at in range(len(mixed))]
    der, student = DERLoss(CausalLMLoss(label_smoothing=0.1), alpha=0.7, beta=0.4), tiny_llama()
    whole, total = der(student, collate(rows))[0], 0.0
    for row in rows:
        total = total + der(student, collate([row]))[0] * der.count_targets(collate([row]))
    assert_close((total / der.count_targets(collate(rows))).detach(), whole.detach(), rtol=1e-5)


def test_a_run_with_a_buffer(tmp_path):
    """Buffer, predictions at insertion, mixing and loss together, in the loop."""
    teacher, buffer = tiny_bert(1, labels=3), ReplayBuffer(2)
    buffer.add(CLASSES, prepare=lambda kept: with_teacher(kept, teacher))
    mixed = MixedBatches(CLASSES, buffer, 0.4)
    settings = LoopSettings(max_steps=4, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2, progress=False)
    loss = DERLoss(classification_loss, alpha=0.2, beta=0.5)
    model = tiny_bert(labels=3)
    history = TrainingLoop(model, mixed, settings=settings, collate=collate_padded, loss=loss).fit()
    assert {"task_loss", "replay_loss", "distillation"} <= set(history[-1])
    assert history[0]["loss"] == pytest.approx(
        history[0]["task_loss"] + 0.5 * history[0]["replay_loss"] + 0.2 * history[0]["distillation"], rel=1e-5
    )


def test_bad_input():
    with pytest.raises(ValueError, match="alpha must be a finite number, 0 or more; got -1"):
        DERLoss(alpha=-1.0)
    with pytest.raises(ValueError, match="beta must be a finite number, 0 or more; got nan"):
        DERLoss(alpha=1.0, beta=float("nan"))
    with pytest.raises(ValueError, match="alpha and beta are both 0: replayed rows would teach nothing"):
        DERLoss(alpha=0.0)
    with pytest.raises(TypeError, match="the loss must be causal_lm_loss, masked_lm_loss"):
        DERLoss(F.cross_entropy, alpha=1.0)
    with pytest.raises(ValueError, match=r"needs teacher_logprobs, .* and it has no field of a teacher"):
        DERLoss(alpha=1.0)(tiny_llama(), collate_packed(ROWS))
    rows = with_teacher(ROWS, tiny_llama(), k=3, temperature=2.0)
    with pytest.raises(ValueError, match="made at temperature 2, and the loss has temperature 1"):
        DERLoss(alpha=1.0)(tiny_llama(), collate_packed(rows))
    silent = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    with pytest.raises(ValueError, match="the mean needs at least one target"):
        DERLoss(alpha=1.0)(tiny_llama(), collate_packed(with_teacher(silent, tiny_llama(), k=3)))
    with pytest.raises(ValueError, match="dark experience replay needs integer labels"):
        DERLoss(ClassificationLoss(), alpha=1.0)(tiny_bert(labels=3), {"input_ids": torch.ones(1, 2).long()})
