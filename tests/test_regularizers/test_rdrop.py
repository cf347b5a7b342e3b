import copy
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.regularizers.rdrop import RDropLoss, r_drop_loss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.types import LossFunction

ROWS = uneven_rows(5)
CLASSES = [{**row, "labels": (2, -100, 0, 1, 2)[index]} for index, row in enumerate(ROWS)]
PADDED = collate_padded(ROWS)
CASES = {
    "gpt2 padded": (tiny_gpt2, PADDED, causal_lm_loss),
    "gpt2 padded left": (tiny_gpt2, collate_padded(ROWS, side="left"), CausalLMLoss(label_smoothing=0.1, z_loss=1e-3)),
    "gpt2 packed": (tiny_gpt2, collate_packed(ROWS), causal_lm_loss),
    "bert masked": (tiny_bert, PADDED, masked_lm_loss),
    "bert classifier": (partial(tiny_bert, labels=3), collate_padded(CLASSES), classification_loss),
    "t5": (tiny_t5, PADDED, sequence_to_sequence_loss),
}  # fmt: skip


def all_logits(model, batch, loss):
    """Return (logits, targets) of the labelled places, all logits built by the model itself."""
    inputs, targets = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if loss is sequence_to_sequence_loss:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=targets)
    if isinstance(loss, CausalLMLoss) or loss is sequence_to_sequence_loss:
        inputs["use_cache"] = False
    logits = model(**inputs).logits
    if isinstance(loss, CausalLMLoss):
        logits, targets = logits[:, :-1], targets[:, 1:]
    return logits[targets != -100].double(), targets[targets != -100]


def hard(loss, z, t):
    smooth = getattr(loss, "label_smoothing", 0.0)
    plain = F.cross_entropy(z, t, label_smoothing=smooth)
    return plain + getattr(loss, "z_loss", 0.0) * z.logsumexp(-1).square().mean()


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula(case):
    """Two passes that draw what the loss's two draw, all logits held, KL by torch's own function."""
    make, batch, loss = CASES[case]
    model = make(dropout=0.2).train()
    rdrop = RDropLoss(loss, alpha=0.7)
    torch.manual_seed(5)
    total, parts = rdrop(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(5)
    (a, t), (b, _) = (all_logits(model, batch, loss) for _ in range(2))
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    kl = [F.kl_div(x, y, reduction="batchmean", log_target=True) for x, y in ((p, q), (q, p))]
    task, divergence = (hard(loss, a, t) + hard(loss, b, t)) / 2, sum(kl) / 2
    expected = task + 0.7 * divergence
    expected.backward()
    assert divergence > 1e-3
    assert_close(total.detach(), expected.detach().float(), rtol=1e-5)
    assert_close(parts["task_loss"], task.detach().float(), rtol=1e-5)
    assert_close(parts["r_drop"], divergence.detach().float(), rtol=1e-4)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((found[name] - parameter.grad).abs().max()) <= 1e-5 * largest, name
    assert isinstance(rdrop, LossFunction)
    assert rdrop.count_targets(batch) == loss.count_targets(batch) == len(t)


def test_the_function_is_the_formula_and_a_mean_over_labelled_rows():
    a, b = torch.randn(2, 2, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5))
    targets[0, 3:], targets[1, 0] = -100, -100
    kept = targets != -100
    p, q, t = a[kept].softmax(-1), b[kept].softmax(-1), targets[kept]
    task = -(p.log() + q.log())[range(len(t)), t].mean() / 2
    divergence = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    assert_close(r_drop_loss(a, b, targets, alpha=1.5), task + 1.5 * divergence, rtol=1e-12)
    a[~kept], b[~kept] = torch.nan, torch.inf
    assert_close(r_drop_loss(a, b, targets, alpha=1.5), task + 1.5 * divergence, rtol=1e-12)


def test_more_padding_does_not_change_the_weight_of_the_divergence():
    a, b = torch.randn(2, 3, 5)
    targets = torch.tensor([1, 0, 4])
    wide = [torch.cat([z, torch.randn(8, 5)]) for z in (a, b)]
    padded = r_drop_loss(*wide, torch.cat([targets, torch.full((8,), -100)]), alpha=2.0)
    assert_close(padded, r_drop_loss(a, b, targets, alpha=2.0), rtol=1e-6)


def test_without_dropout_it_raises_and_in_evaluation_it_does_not():
    model, batch = tiny_llama().train(), collate_packed(ROWS)
    rdrop = RDropLoss(alpha=1.0)
    message = (
        r"R-Drop compares two draws of dropout, and LlamaForCausalLM has none: .* Set dropout in its configuration"
    )
    with pytest.raises(ValueError, match=message):
        rdrop(model, batch)
    plain = causal_lm_loss(model, batch)
    with torch.no_grad():
        assert rdrop(model, batch).item() == plain.item()
    assert rdrop(model.eval(), batch).item() == plain.item()


@pytest.mark.parametrize("where", ["attention", "module", "adapter at its start"])
def test_any_dropout_will_do(where):
    """LoRA's B is 0 at the start, so its dropout changes no output yet: two equal passes are no proof."""
    model, batch = tiny_llama(), collate_padded(ROWS)
    if where == "attention":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
    elif where == "module":
        model.model.embed_tokens = nn.Sequential(model.model.embed_tokens, nn.Dropout(0.3))
        model.model.embed_tokens.weight = model.model.embed_tokens[0].weight
    else:
        attach(model, LoRA(rank=2, alpha=4, dropout=0.3))
    _, parts = RDropLoss(alpha=1.0)(model.train(), batch)
    assert (parts["r_drop"] == 0) == (where == "adapter at its start")


def test_an_adapter_with_dropout_0_raises():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=4))
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        RDropLoss(alpha=1.0)(model.train(), PADDED)


class Alternating(nn.Module):
    """A stand-in for dropout that draws nothing: every second pass has other embeddings, row by row the same."""

    def __init__(self, base):
        super().__init__()
        self.base, self.weight, self.passes = base, base.weight, 0

    def forward(self, ids):
        self.passes += 1
        return self.base(ids) * (1.0 if self.passes % 2 else 0.8)


def test_rows_in_any_split_give_one_gradient():
    model = tiny_llama().double().train()
    model.model.embed_tokens = Alternating(model.model.embed_tokens)
    rdrop, gradients = RDropLoss(alpha=2.0), []
    for batches in (
        [PADDED],
        [collate_packed(ROWS[:2]), collate_padded(ROWS[2:])],
        [collate_padded([r]) for r in ROWS],
    ):
        counts = [rdrop.count_targets(batch) for batch in batches]
        model.zero_grad()
        for batch, count in zip(batches, counts, strict=True):
            loss, parts = rdrop(model, batch)
            assert parts["r_drop"] > 0
            (loss * count / sum(counts)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        assert_close(other, gradients[0], rtol=1e-9)


def test_logits_are_never_all_held(monkeypatch):
    from llmtune.losses import chunked

    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    model = tiny_gpt2(dropout=0.1).train()
    batch = collate_packed([{"input_ids": list(range(3, 83)), "labels": list(range(3, 83))}] * 3)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 97:
                largest.append(out.shape[0])
            return out

    with Watch():
        RDropLoss(alpha=1.0)(model, batch)[0].backward()
    assert 0 < max(largest) <= 64


def test_under_autocast_and_compiled():
    model = tiny_gpt2(dropout=0.1).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = RDropLoss(alpha=1.0)(model, PADDED)
    loss.backward()
    assert loss.dtype == parts["r_drop"].dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
    once = torch.compile(copy.deepcopy(model), backend="aot_eager")
    _, parts = RDropLoss(alpha=1.0)(once, PADDED)
    assert parts["r_drop"] > 1e-3
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha must be a finite number, 0 or more; got -1.0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be a finite number"),
        ({"alpha": 1.0, "loss": F.cross_entropy}, TypeError, "R-Drop compares predictions, so its loss must be one"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        RDropLoss(**options)


def test_bad_tensors_and_batches():
    z, t = torch.zeros(3, 5), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=re.escape("got [3, 5], [3, 5] and [2]")):
        r_drop_loss(z, z, t[:2], alpha=1.0)
    with pytest.raises(ValueError, match=re.escape("got [3, 5], [2, 5] and [3]")):
        r_drop_loss(z, z[:2], t, alpha=1.0)
    with pytest.raises(ValueError, match="all 3 are ignored"):
        r_drop_loss(z, z, torch.full((3,), -100), alpha=1.0)
    with pytest.raises(ValueError, match="target 1 is 9"):
        r_drop_loss(z, z, torch.tensor([0, 9, 2]), alpha=1.0)
    with pytest.raises(TypeError, match="targets must be integers"):
        r_drop_loss(z, z, torch.zeros(3), alpha=1.0)
    model = tiny_bert(labels=3, dropout=0.1).train()
    classes = collate_padded(CLASSES)
    rdrop = RDropLoss(classification_loss, alpha=1.0)
    with pytest.raises(ValueError, match=r"integer labels \[B\] or \[B, T\] are needed; got torch.float32 \[5\]"):
        rdrop(model, {**classes, "labels": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"labels \[5, 7\] need one row of outputs each"):
        rdrop(model, PADDED)
    with pytest.raises(ValueError, match="all labels of the batch are ignored"):
        rdrop(model, {**classes, "labels": torch.full((5,), -100)})
