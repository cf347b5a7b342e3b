"""What the tests of distillation share: models, rows, and the plain formulas with all logits in float64."""

from __future__ import annotations

import torch

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

ROWS = uneven_rows(5)
CLASSES = [{**row, "labels": (2, -100, 0, 1, 2)[index]} for index, row in enumerate(ROWS)]
TARGETS = [{**row, "labels": row["input_ids"][: 2 + index % 3]} for index, row in enumerate(ROWS)]

CASES = {  # (model of a seed, rows, collate, loss)
    "llama packed": (tiny_llama, ROWS, collate_packed, causal_lm_loss),
    "llama padded": (tiny_llama, ROWS, collate_padded, causal_lm_loss),
    "gpt2": (tiny_gpt2, ROWS, collate_padded, causal_lm_loss),
    "bert masked": (tiny_bert, ROWS, collate_padded, masked_lm_loss),
    "t5": (tiny_t5, TARGETS, collate_padded, sequence_to_sequence_loss),
    "classifier": (lambda seed=0: tiny_bert(seed, labels=3), CLASSES, collate_padded, classification_loss),
}
OF_TOKENS = [name for name in CASES if name != "classifier"]


def logits_at_targets(model, batch, loss):
    """Return [m, V] float64 logits at the places that have a target, and the targets [m]."""
    plain = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    labels = plain.pop("labels")
    if loss is sequence_to_sequence_loss:
        plain["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if loss is causal_lm_loss:
        plain["use_cache"] = False
    logits = model(**plain).logits.double()
    if loss is causal_lm_loss:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return logits[labels != -100], labels[labels != -100]


def divergence(student, teacher, temperature=1.0):
    """Return temperature^2 KL(teacher || student), [m], of logits [m, C]."""
    log_p, log_q = (z.div(temperature).log_softmax(-1) for z in (teacher, student))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        off = float((found[name] - g).abs().max())
        assert off <= 1e-4 * float(g.abs().max()) + 2e-6 * largest, name


def cross_entropies(logits, targets):
    return -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
