import copy
import re

import pytest
import torch
from references import (
    CASES,
    CLASSES,
    assert_same_gradients,
    divergence,
    gradients,
    logits_at_targets,
)

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.forgetting.distillation import DistillToBase
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.testing.small import moved


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula(case, temperature):
    make, rows, collate, loss = CASES[case]
    model, teacher, batch = make(), make(1), collate(rows)
    distill = DistillToModel(teacher, loss, strength=0.7, temperature=temperature)
    total, parts = distill(model, batch)
    found = gradients(model, total)
    with torch.no_grad():
        wanted, _ = logits_at_targets(teacher, batch, loss)
    student, _ = logits_at_targets(model, batch, loss)
    expected = divergence(student, wanted, temperature).mean()
    assert_close(parts["distillation"], expected.detach().float(), rtol=1e-4)
    assert expected > 1e-3
    whole = loss(model, batch) + 0.7 * expected
    assert_close(total.detach(), whole.detach(), rtol=1e-5)
    assert_same_gradients(found, gradients(model, whole.float()))
    assert not any(p.grad is not None for p in teacher.parameters())


def test_is_distillation_to_the_base_where_the_teacher_is_its_copy():
    make, rows, collate, loss = CASES["llama packed"]
    model, teacher = make(), make()
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=5))
    moved(model)
    one, _ = DistillToModel(teacher, loss, strength=0.5)(model, collate(rows))
    other, _ = DistillToBase(loss, strength=0.5)(model, collate(rows))
    assert_close(one.detach(), other.detach(), rtol=1e-6)


def test_heads_of_two_kinds():
    """An adapted head is no plain linear layer, and the teacher's is: both are called a few rows at a time."""
    make, rows, collate, loss = CASES["llama padded"]
    model, teacher, batch = make(), make(1), collate(rows)
    torch.manual_seed(0)
    attach(model, LoRA(rank=2, alpha=3, targets=["lm_head"]))
    moved(model)
    total, parts = DistillToModel(teacher, loss, strength=1.0)(model, batch)
    with torch.no_grad():
        student, wanted = (logits_at_targets(m, batch, loss)[0] for m in (model, teacher))
    assert_close(parts["distillation"], divergence(student, wanted).mean().float(), rtol=1e-4)
    total.backward()


def test_a_teacher_that_bounds_its_logits_and_a_student_that_does_not():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    options = {
        "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 1, "pad_token_id": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14,
    }  # fmt: skip
    torch.manual_seed(0)
    capped, free = (
        Gemma2ForCausalLM(Gemma2Config(**options, final_logit_softcapping=cap)).eval() for cap in (3.0, None)
    )
    for model in (capped, free):
        torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    _, rows, collate, loss = CASES["llama packed"]
    for student, teacher in ((free, capped), (capped, free)):
        _, parts = DistillToModel(teacher, loss, strength=1.0)(student, collate(rows))
        with torch.no_grad():
            logits = [logits_at_targets(m, collate(rows), loss)[0] for m in (student, teacher)]
        assert_close(parts["distillation"], divergence(*logits).mean().float(), rtol=1e-4)


@pytest.mark.parametrize(("classes", "numbers"), [(3, [0, 1, 2]), ((4, 0, 2), [4, 0, 2])])
def test_old_classes_alone(classes, numbers):
    """A head that has grown from 5 to 7 classes: each side's softmax is over the chosen ones."""
    student, teacher, batch = tiny_bert(labels=7), tiny_bert(1, labels=5), collate_padded(CLASSES)
    distill = DistillToModel(teacher, classification_loss, strength=1.0, temperature=2.0, classes=classes)
    _, parts = distill(student, batch)
    with torch.no_grad():
        ours, theirs = (logits_at_targets(m, batch, classification_loss)[0][:, numbers] for m in (student, teacher))
    assert_close(parts["distillation"], divergence(ours, theirs, 2.0).mean().float(), rtol=1e-5)


def test_modes_dropout_and_random_state():
    student, teacher = tiny_gpt2(dropout=0.5).train(), tiny_gpt2(1, dropout=0.5).train()
    batch = CASES["gpt2"][2](CASES["gpt2"][1])
    torch.manual_seed(0)
    _, parts = DistillToModel(teacher, strength=1.0)(student, batch)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert causal_lm_loss(student, batch).item() == parts["task_loss"].item()
    assert torch.equal(state, torch.get_rng_state())
    _, again = DistillToModel(teacher.eval(), strength=1.0)(student.eval(), batch)
    torch.manual_seed(0)
    _, first = DistillToModel(teacher.train(), strength=1.0)(student, batch)
    assert first["distillation"].item() == again["distillation"].item()
    assert teacher.training


def test_under_autocast_in_bfloat16():
    make, rows, collate, loss = CASES["llama packed"]
    model = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = DistillToModel(make(1), loss, strength=0.5)(model, collate(rows))
    assert total.dtype == torch.float32
    total.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_input():
    model = tiny_llama()
    batch = collate_packed(CASES["llama packed"][1])
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
        DistillToModel("teacher", strength=1.0)
    with pytest.raises(ValueError, match="strength must be a finite number, 0 or more; got -1"):
        DistillToModel(model, strength=-1.0)
    for classes in (1, (1,), (1, 1), (0, -1), "01", (0, 1.5)):
        with pytest.raises(ValueError, match=f"classes must be how many .*; got {re.escape(repr(classes))}"):
            DistillToModel(model, strength=1.0, classes=classes)
    with pytest.raises(ValueError, match="has parameters that are trained with the student"):
        DistillToModel(model, strength=1.0)(model, batch)
    shared = copy.copy(model)
    with pytest.raises(ValueError, match="has parameters that are trained with the student"):
        DistillToModel(shared, strength=1.0)(model, batch)
    with pytest.raises(ValueError, match="classes choose among those of a classifier"):
        DistillToModel(tiny_llama(1), strength=1.0, classes=5)(model, batch)
    five, seven, rows = tiny_bert(1, labels=5), tiny_bert(labels=7), collate_padded(CLASSES)
    with pytest.raises(ValueError, match=r"the student has 7 classes and the teacher 5: .* such as classes=5"):
        DistillToModel(five, classification_loss, strength=1.0)(seven, rows)
    with pytest.raises(ValueError, match="classes name class 5, and one of the two models has only 5"):
        DistillToModel(five, classification_loss, strength=1.0, classes=6)(seven, rows)
