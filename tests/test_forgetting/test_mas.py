import copy

import pytest
import torch
from penalty_runs import fitted, through_a_file
from torch import nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.merge import merge
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.forgetting.mas import MemoryAwareSynapses, output_sensitivity
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved

ROWS = uneven_rows(5)
CLASSES = [{**row, "labels": index % 3} for index, row in enumerate(ROWS)]
X = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))


def linear():
    torch.manual_seed(3)
    return nn.Linear(5, 3)


@pytest.mark.parametrize("method", ["loop", "hooks"])
@pytest.mark.parametrize("size", [1, 4, 11])
def test_of_a_linear_layer_it_is_known(method, size):
    """d ||W x + b||^2 / d W[c, i] = 2 f_c x_i, whatever the batches are."""
    model = linear()
    f = X.double() @ model.weight.T.double() + model.bias.double()
    expected = (2 * f[:, :, None] * X.double()[:, None]).abs().mean(0)
    for batches in (list(X.split(size)), [(x, torch.zeros(len(x))) for x in X.flip(0).split(size)]):
        found = output_sensitivity(model, batches, method=method)
        assert_close(found["weight"], expected.detach(), rtol=1e-5)
        assert_close(found["bias"], (2 * f).abs().mean(0).detach(), rtol=1e-5)


def test_examples_of_opposite_sign_do_not_cancel_out():
    """The absolute value of a batch's mean gradient would be 0 here."""
    model = nn.Linear(1, 2, bias=False)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])

    class Signed(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return torch.ones(2) + self.w * x

    assert output_sensitivity(Signed(), [pair])["w"].tolist() == [2.0, 2.0]
    assert output_sensitivity(model, [torch.zeros(3, 1)])["weight"].tolist() == [[0.0], [0.0]]


CASES = {
    "llama": (tiny_llama, ROWS),
    "llama tied": (lambda: tiny_llama(tied=True), ROWS),
    "gpt2": (lambda: tiny_gpt2(dropout=0.5).train(), ROWS),
    "t5": (tiny_t5, ROWS),
    "bert masked": (tiny_bert, ROWS),
    "bert classifier": (lambda: tiny_bert(labels=3), CLASSES),
}


def reference(model, rows):
    """Return it by the plain formula, in float64, each row run alone and all of its logits held."""
    model = copy.deepcopy(model).double().eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        inputs = {"input_ids": torch.tensor([row["input_ids"]])}
        if model.config.is_encoder_decoder:
            labels = torch.tensor([row["labels"]])
            labels = labels[:, : int(torch.nonzero(labels[0] != -100).max()) + 1]
            inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = model(**inputs).logits
        if model.config.is_encoder_decoder:
            logits = logits[labels != -100]
        found = torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True)
        for total, gradient in zip(sums.values(), found, strict=True):
            total += 0 if gradient is None else gradient.abs() / len(rows)
    return sums


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula_for_all_kinds_of_models(case):
    make, rows = CASES[case]
    model = make()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    expected = reference(model, rows)
    largest = max(float(value.max()) for value in expected.values())
    for batches, method in (([collate_padded(rows)], "loop"), ([collate_padded([r]) for r in rows[::-1]], "auto")):
        found = output_sensitivity(model, batches, method=method)
        for name, value in found.items():
            off = float((value.double() - expected[name]).abs().max())
            assert off <= 1e-4 * float(expected[name].max()) + 1e-7 * largest, f"{name}: off by {off}"
    if case in ("llama", "llama tied", "gpt2"):
        found = output_sensitivity(model, [collate_packed(rows)], method="hooks")
        for name, value in found.items():
            assert float((value.double() - expected[name]).abs().max()) <= 1e-4 * float(expected[name].max()), name
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_labels_are_not_looked_at():
    model = tiny_llama()
    with_labels = output_sensitivity(model, [collate_padded(ROWS)])
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ROWS]
    ignored = output_sensitivity(model, [collate_padded(rows)])
    batch = collate_padded(ROWS)
    del batch["labels"]
    without = output_sensitivity(model, [batch])
    for name, value in with_labels.items():
        assert torch.equal(value, ignored[name])
        assert torch.equal(value, without[name])


@pytest.mark.parametrize("method", ["loop", "hooks"])
def test_under_lora_it_is_that_of_the_merged_model(method):
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    moved(model)
    found = output_sensitivity(model, [collate_padded(ROWS)], method=method)
    merge(model, keep_base=False)
    expected = output_sensitivity(model, [collate_padded(ROWS)], method="loop", parameters=list(found))
    assert len(found) == 14
    for name, value in found.items():
        assert_close(value, expected[name], rtol=1e-4, what=name)


def test_logits_are_never_all_held(monkeypatch):
    """Of a language model whose head is not chosen: rows come through the head a few at a time."""
    from llmtune.forgetting import mas

    model = tiny_llama()
    names = ["model.norm.weight"]
    expected = output_sensitivity(model, [collate_padded(ROWS)], parameters=names)
    monkeypatch.setattr(mas, "default_chunk_rows", lambda *_, **__: 2)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    found = output_sensitivity(model, [collate_padded(ROWS)], parameters=names)
    assert_close(found["model.norm.weight"], expected["model.norm.weight"], rtol=1e-5)
    rows = [shape[0] for shape in seen if len(shape) == 2]
    assert rows
    assert max(rows) == 2


def test_the_penalty_by_hand(tmp_path):
    model, penalty = linear(), MemoryAwareSynapses(3.0)
    assert penalty(model).item() == 0.0
    penalty.finish_task(model, [X[:4]])
    first = output_sensitivity(model, [X[:4]])
    moved(model)
    penalty.finish_task(model, [X[4:]])
    second, at = output_sensitivity(model, [X[4:]]), copy.deepcopy(model)
    moved(model, seed=1)
    expected = sum(
        1.5 * ((first[n] + second[n]) * (p - q).square()).sum()
        for (n, p), (_, q) in zip(model.named_parameters(), at.named_parameters(), strict=True)
    )
    assert_close(penalty(model).detach(), expected.detach(), rtol=1e-5)
    other = MemoryAwareSynapses(3.0)
    other.load_state_dict(through_a_file(penalty.state_dict(), tmp_path))
    assert torch.equal(other(model), penalty(model))
    given = MemoryAwareSynapses(3.0)
    given.finish_task(at, importance={n: first[n] + second[n] for n in first})
    assert_close(given(model).detach(), expected.detach(), rtol=1e-5)


RUNS = {
    "bert": (lambda: tiny_bert(labels=3), CLASSES, classification_loss, ["query"]),
    "gpt2": (tiny_gpt2, ROWS, causal_lm_loss, ["c_attn"]),
    "t5": (tiny_t5, ROWS, sequence_to_sequence_loss, ["q"]),
}


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("case", RUNS)
def test_a_run_stopped_within_the_second_task_goes_on_bit_for_bit(tmp_path, case, adapted):
    make, rows, loss, targets = RUNS[case]

    def start():
        torch.manual_seed(1)
        model, penalty = make(), MemoryAwareSynapses(0.1)
        if adapted:
            attach(model, LoRA(rank=2, alpha=4, targets=targets))
            moved(model, seed=2)
        penalty.finish_task(model, [collate_padded(rows)], method="loop")
        return model, penalty

    whole = fitted(*start(), rows, loss)
    assert whole.history[-1]["penalty"] > 0
    fitted(*start(), rows, loss, tmp_path, stop=2)
    resumed = fitted(start()[0], MemoryAwareSynapses(0.1), rows, loss, tmp_path)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [row["penalty"] for row in resumed.history] == [row["penalty"] for row in whole.history]


NAN = torch.tensor([[float("nan")] * 5])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, p: output_sensitivity(m, X), TypeError, "batches must be a list, .*; got a single one"),
        (lambda m, p: output_sensitivity(m, ["text"]), TypeError, r"a batch must be a dict .*; got str"),
        (lambda m, p: output_sensitivity(m, []), ValueError, "there is no example: the batches are empty"),
        (lambda m, p: output_sensitivity(m, [NAN]), ValueError, "the sensitivity to weight is not finite"),
        (lambda m, p: output_sensitivity(m, [X[None, None]]), ValueError, r"must be logits, .* gave \[1, 1, 11, 3\]"),
        (lambda m, p: output_sensitivity(m, [X], parameters=["wieght"]), ValueError, 'no parameter "wieght"'),
        (lambda m, p: p.finish_task(m, []), ValueError, "there is no example: the batches are empty"),
        (lambda m, p: p.finish_task(m), ValueError, "needs the task's batches, or its importance, and not both"),
        (lambda m, p: p.finish_task(m, importance={}), ValueError, "the importance names no parameter"),
        (
            lambda m, p: p.finish_task(m, importance={"weight": torch.ones(5, 3)}),
            ValueError,
            r"weight is \[3, 5\] in the model and \[5, 3\] in the importance: another model's",
        ),
        (
            lambda m, p: output_sensitivity(tiny_t5(), [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]),
            ValueError,
            'an encoder-decoder needs "labels" or "decoder_input_ids"',
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(linear(), MemoryAwareSynapses(1.0))


def test_frozen_since_the_anchor_was_taken():
    model, penalty = linear(), MemoryAwareSynapses(1.0)
    penalty.finish_task(model, [X])
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"MemoryAwareSynapses reaches no parameter that is trained: all 2 that the imp"
    ):
        penalty(model)
