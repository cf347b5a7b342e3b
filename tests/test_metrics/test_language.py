import copy
import math

import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.errors import NonFiniteError
from llmtune.losses import chunked
from llmtune.metrics.language import perplexity
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama

ROWS = uneven_rows(5)


def reference(model, rows):
    """Return the perplexity by the plain formula, in float64, each row run alone."""
    model, total, count = copy.deepcopy(model).double().eval(), 0.0, 0
    for row in rows:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                total, count = total - log_p[place, label].item(), count + 1
    return math.exp(total / count)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_gpt2(dropout=0.5).train()])
@pytest.mark.parametrize(
    "batches",
    [
        [collate_packed(ROWS)],
        [collate_packed(ROWS[:1]), collate_packed(ROWS[1:])],
        [collate_padded(ROWS)],
        [collate_padded([row]) for row in ROWS],
        [collate_padded(ROWS), {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, -100]])}],
    ],
)
def test_equals_the_plain_formula_however_rows_are_batched(make, batches):
    model = make()
    assert perplexity(model, iter(batches)) == pytest.approx(reference(model, ROWS), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    model = tiny_llama()
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, [collate_packed(ROWS)]) == pytest.approx(97.0, rel=1e-6)


def test_modes_gradients_and_random_state_are_as_before():
    model = tiny_gpt2(dropout=0.5).train()
    model.transformer.h[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = torch.get_rng_state()
    perplexity(model, [collate_packed(ROWS)])
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_logits_are_never_all_held(monkeypatch):
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    ids = [[*range(3, 93)]] * 3
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == 97:
                largest.append(out.numel() // 97)
            return out

    with Watch():
        perplexity(tiny_llama(), [collate_packed([{"input_ids": row, "labels": row} for row in ids])])
    assert 0 < max(largest) <= 64


def test_infinite_and_not_a_number():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    assert perplexity(model, [collate_packed(ROWS)]) == math.inf
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the loss of batch 1 \(from 0\) is NaN"):
        perplexity(
            model, [{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, -100]])}, collate_padded(ROWS)]
        )


def test_bad_input():
    model = tiny_llama()
    with pytest.raises(ValueError, match="there is no target to predict"):
        perplexity(model, [])
    with pytest.raises(ValueError, match="all labels are -100"):
        perplexity(model, [{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, -100]])}])
    with pytest.raises(TypeError, match="got a single one"):
        perplexity(model, collate_packed(ROWS))
