"""What was kept of the base, against the plain formulas in float64, one row at a time."""

import copy
import math

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, adapter_parameters, attach, disabled, merge
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.errors import NonFiniteError
from llmtune.forgetting import greedy_agreement, kl_to_base, perplexity_change, retention
from llmtune.losses import chunked
from llmtune.metrics import perplexity
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

ROWS = uneven_rows(5)


def adapted(make=tiny_llama, **options):
    model = make()
    attach(model, LoRA(rank=3, alpha=5, **options))
    generator = torch.Generator().manual_seed(29)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def by_hand(logits, base_logits, targets):
    """Return (KL, agreement, perplexity, base's perplexity) from float64 logits [n, V] and targets [n]."""
    q, p = logits.softmax(-1), base_logits.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1).mean().item()
    agreed = (q.argmax(-1) == p.argmax(-1)).double().mean().item()
    own, base = (math.exp(-x[range(len(targets)), targets].log().mean().item()) for x in (q, p))
    return kl, agreed, own, base


def reference(model, rows):
    model = copy.deepcopy(model).double().eval()
    every = [[], [], []]
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            own = model(input_ids=ids).logits[0, :-1]
            with disabled(model):
                base = model(input_ids=ids).logits[0, :-1]
        for found, tensor in zip(every, (own, base, labels), strict=True):
            found.append(tensor[labels != -100])
    return by_hand(*map(torch.cat, every))


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_gpt2(dropout=0.5).train()])
@pytest.mark.parametrize(
    "batches",
    [
        [collate_packed(ROWS)],
        [collate_packed(ROWS[:1]), collate_packed(ROWS[1:])],
        [collate_padded(ROWS), {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, -100]])}],
    ],
)
def test_equals_the_plain_formulas_however_rows_are_batched(make, batches):
    options = {"targets": ["c_attn"]} if make is not tiny_llama else {}
    model = adapted(make, **options)
    kl, agreed, own, base = reference(model, ROWS)
    assert 0.01 < kl
    found = retention(model, iter(batches))
    assert found["kl_to_base"] == pytest.approx(kl, rel=1e-4)
    assert found["greedy_agreement"] == pytest.approx(agreed, abs=1e-9)
    assert found["perplexity"] == pytest.approx(own, rel=1e-5)
    assert found["base_perplexity"] == pytest.approx(base, rel=1e-5)
    assert found["perplexity_change"] == found["perplexity"] - found["base_perplexity"]
    assert found["perplexity"] == pytest.approx(perplexity(model, batches), rel=1e-5)
    assert kl_to_base(model, batches) == found["kl_to_base"]
    assert greedy_agreement(model, batches) == found["greedy_agreement"]
    assert perplexity_change(model, batches) == found["perplexity_change"]


def test_an_adapted_head_is_the_bases_own_for_the_base():
    model = adapted(targets=["q_proj", "lm_head"])
    kl, agreed, _, base = reference(model, ROWS)
    found = retention(model, [collate_packed(ROWS)])
    assert (found["kl_to_base"], found["greedy_agreement"]) == (pytest.approx(kl, rel=1e-4), pytest.approx(agreed))
    assert found["base_perplexity"] == pytest.approx(base, rel=1e-5)


def test_the_base_as_a_module_is_the_base_as_an_adapter_switched_off():
    model = adapted()
    batches = [collate_padded(ROWS)]
    off, other = retention(model, batches), retention(model, batches, base=tiny_llama())
    assert off == pytest.approx(other, rel=1e-6)
    full = copy.deepcopy(model)
    merge(full, keep_base=False)
    assert retention(full, batches, base=tiny_llama()) == pytest.approx(off, rel=1e-3)


def test_the_direction_is_from_the_base():
    model = adapted()
    batches = [collate_padded(ROWS)]
    swapped = kl_to_base(tiny_llama(), batches, base=model)
    assert kl_to_base(model, batches) != pytest.approx(swapped, rel=1e-3)


def test_an_untrained_adapter_has_changed_nothing_at_all():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    found = retention(model, [collate_packed(ROWS)])
    assert (found["kl_to_base"], found["greedy_agreement"], found["perplexity_change"]) == (0.0, 1.0, 0.0)
    assert found["delta_norm"] == 0.0


def test_earlier_adapters_may_belong_to_the_base():
    model = adapted()
    attach(model, LoRA(rank=2, alpha=3), "second")
    batches = [collate_packed(ROWS)]
    assert kl_to_base(model, batches, base=["default"]) == 0.0
    assert kl_to_base(model, batches) == pytest.approx(reference(model, ROWS)[0], rel=1e-4)


def test_classifiers_encoders_and_encoder_decoders():
    ids, seen = torch.tensor([[5, 7, 11, 13], [3, 2, 19, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    for make, labels, targets in (
        (lambda: tiny_bert(labels=3), torch.tensor([2, 0]), ["query"]),
        (tiny_bert, torch.tensor([[5, -100, 11, -100], [-100, 2, -100, -100]]), ["query"]),
        (tiny_t5, torch.tensor([[5, 7, 3], [2, 1, -100]]), ["q", "wo"]),
    ):
        model = adapted(make, targets=targets).eval()
        batch = {"input_ids": ids, "attention_mask": seen, "labels": labels}
        wide = copy.deepcopy(model).double()
        with torch.no_grad():
            own = wide(**batch).logits[labels != -100]
            with disabled(wide):
                base = wide(**batch).logits[labels != -100]
        kl, agreed, ppl, base_ppl = by_hand(own, base, labels[labels != -100])
        found = retention(model, [batch])
        assert found["kl_to_base"] == pytest.approx(kl, rel=1e-3)
        assert found["greedy_agreement"] == agreed
        assert (found["perplexity"], found["base_perplexity"]) == (
            pytest.approx(ppl, rel=1e-4), pytest.approx(base_ppl, rel=1e-4),
        )  # fmt: skip


def test_logits_are_never_all_held(monkeypatch):
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    ids, largest = [[*range(3, 93)]] * 3, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim >= 2 and out.shape[-1] == 97:
                largest.append(out.numel() // 97)
            return out

    with Watch():
        kl_to_base(adapted(), [collate_packed([{"input_ids": row, "labels": row} for row in ids])])
    assert 0 < max(largest) <= 64


def test_modes_gradients_adapters_and_random_state_are_as_before():
    model = adapted(lambda: tiny_gpt2(dropout=0.5), targets=["c_attn"]).train()
    model.transformer.h[0].eval()
    other = tiny_gpt2(dropout=0.5).train()
    modes = {name: m.training for name, m in [*model.named_modules(), *other.named_modules()]}
    state, batches = torch.get_rng_state(), [collate_packed(ROWS)]
    before = model.eval().transformer.h[1].attn.c_attn.active
    model.train().transformer.h[0].eval()
    retention(model, batches)
    kl_to_base(model, batches, base=other)
    assert {name: m.training for name, m in [*model.named_modules(), *other.named_modules()]} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert model.transformer.h[1].attn.c_attn.active is before is True


def test_nan_names_its_batch():
    model = adapted()
    good = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, -100]])}
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"predictions of batch 1 \(from 0\) are NaN"):
        kl_to_base(model, [good, collate_padded(ROWS)])


def test_bad_input():
    model, plain, batches = adapted(), tiny_llama(), [collate_padded(ROWS)]
    with pytest.raises(ValueError, match="there is no target to predict: no batches, or all labels are -100"):
        retention(model, [])
    with pytest.raises(TypeError, match=r"batches must be a list, .* got a single one"):
        retention(model, batches[0])
    with pytest.raises(ValueError, match=r"a likelihood needs integer labels, .* got None"):
        retention(model, [{"input_ids": torch.tensor([[4, 5]])}])
    with pytest.raises(ValueError, match="the model has no adapter to switch off: give the model of before"):
        retention(plain, batches)
    with pytest.raises(ValueError, match="base is the model itself: give the model of before the training"):
        retention(plain, batches, base=plain)
    with pytest.raises(ValueError, match=r"the adapters that are on are those of the base, \['default'\]"):
        retention(model, batches, base=["default"])
    with pytest.raises(ValueError, match='no adapter "other"'):
        retention(model, batches, base=["other"])
    with pytest.raises(TypeError, match=r"base must be a module or a list of adapters' names, .* got 'default'"):
        retention(model, batches, base="default")
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
        retention(None, batches, base=plain)
    smaller = tiny_llama()
    smaller.lm_head = nn.Linear(28, 96, bias=False)
    with pytest.raises(ValueError, match=r"the model gives 97 classes at .* places, and the base 96"):
        kl_to_base(plain, [{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5]])}], base=smaller)
    merge(model)
    with pytest.raises(ValueError, match='"default" is merged into the weights'):
        retention(model, batches)
