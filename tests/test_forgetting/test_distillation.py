import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmtune.adapters.attach import attach, disabled, set_active
from llmtune.adapters.config import LoRA
from llmtune.adapters.merge import merge
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.forgetting.distillation import DistillToBase
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved
from llmtune.types import LossFunction

ROWS = uneven_rows(4)
CLASSES = [{**row, "labels": (2, -100, 0, 1)[index]} for index, row in enumerate(ROWS)]
PADDED = collate_padded(ROWS)


def tiny_gemma2():
    """Return a model that bounds its logits: 3 tanh(z / 3)."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97, hidden_size=28, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, final_logit_softcapping=3.0, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


CASES = {
    "llama packed": (tiny_llama, collate_packed(ROWS), causal_lm_loss, {}),
    "llama padded left": (tiny_llama, collate_padded(ROWS, side="left"), causal_lm_loss, {}),
    "llama tied": (lambda: tiny_llama(tied=True), PADDED, CausalLMLoss(label_smoothing=0.1), {}),
    "llama, adapted head": (tiny_llama, PADDED, causal_lm_loss, {"targets": ["q_proj", "lm_head"]}),
    "llama, copied head": (tiny_llama, PADDED, causal_lm_loss, {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    "gpt2": (tiny_gpt2, collate_packed(ROWS), causal_lm_loss, {"train_bias": "all"}),
    "gemma2, soft-capped": (tiny_gemma2, PADDED, causal_lm_loss, {"targets": ["q_proj", "down_proj"]}),
    "bert classifier": (
        lambda: tiny_bert(labels=3),
        collate_padded(CLASSES),
        classification_loss,
        {"targets": ["query", "dense"], "train_modules": ["classifier"]},
    ),
    "bert masked": (tiny_bert, PADDED, masked_lm_loss, {"targets": ["query", "dense"]}),
    "t5": (tiny_t5, PADDED, sequence_to_sequence_loss, {"targets": ["q", "v", "wi"]}),
}


def adapted(case, *, trained=True, dropout=0.0):
    make, batch, loss, options = CASES[case]
    model = make()
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=5, dropout=dropout, **options))
    return (moved(model) if trained else model), batch, loss


def logits_and_mask(model, batch, loss):
    """Return float64 logits [..., V] at the places that predict, and where there is a target."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    labels = batch["labels"]
    if loss is sequence_to_sequence_loss:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
    if isinstance(loss, CausalLMLoss):
        inputs["use_cache"] = False
    logits = model(**inputs).logits.double()
    return (logits[:, :-1], labels[:, 1:] != -100) if isinstance(loss, CausalLMLoss) else (logits, labels != -100)


def plain(model, batch, loss, *, strength, temperature):
    """Return (total, divergence) by the plain formula, with all logits."""
    with disabled(model), torch.no_grad():
        teacher, mask = logits_and_mask(model, batch, loss)
    student, _ = logits_and_mask(model, batch, loss)
    log_p, log_q = (t[mask].div(temperature).log_softmax(-1) for t in (teacher, student))
    divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return loss(model, batch) + strength * divergence, divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula(case, temperature):
    model, batch, loss = adapted(case)
    distill = DistillToBase(loss, strength=0.7, temperature=temperature)
    total, parts = distill(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected, divergence = plain(model, batch, loss, strength=0.7, temperature=temperature)
    expected.backward()
    assert_close(total.detach(), expected.detach(), rtol=1e-5)
    assert_close(parts["distillation"], divergence.detach().float(), rtol=1e-4)
    assert_close(parts["task_loss"], loss(model, batch).detach(), rtol=1e-6)
    assert divergence > 1e-4
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name not in found)
        if p.grad is not None:
            off = float((found[name] - p.grad).abs().max())
            assert off <= 1e-4 * float(p.grad.abs().max()) + 1e-6 * largest, name
    assert isinstance(distill, LossFunction)
    assert distill.count_targets(batch) == loss.count_targets(batch)


@pytest.mark.parametrize("case", CASES)
def test_exactly_0_at_the_start_of_lora(case):
    """The divergence is 0 to the bit and adds nothing to any gradient."""
    model, batch, loss = adapted(case, trained=False)
    model.train()
    total, parts = DistillToBase(loss, strength=1e6, temperature=2.0)(model, batch)
    assert parts["distillation"].item() == 0.0
    assert total.item() == parts["task_loss"].item()
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss(model, batch).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(found[name], p.grad), name


def test_the_teacher_keeps_the_adapters_it_is_told_to():
    model, batch, loss = adapted("llama packed")
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), name="second_task")
    _, to_base = DistillToBase(strength=1.0)(model, batch)
    _, to_first = DistillToBase(strength=1.0, teacher=["default"])(model, batch)
    assert to_first["distillation"].item() == 0.0 < to_base["distillation"].item()
    moved(model, seed=3)
    _, to_first = DistillToBase(strength=1.0, teacher=("default",))(model, batch)
    with torch.no_grad():
        student, mask = logits_and_mask(model, batch, loss)
        set_active(model, "default")
        teacher, _ = logits_and_mask(model, batch, loss)
    expected = F.kl_div(student[mask].log_softmax(-1), teacher[mask].softmax(-1), reduction="batchmean")
    assert_close(to_first["distillation"], expected, rtol=1e-4)


class Recording:
    """An inner loss that counts forward passes, has parts of its own, and looks at the state it is run in."""

    def __init__(self, runs=1):
        self.runs, self.seen = runs, []

    def __call__(self, model, batch):
        for _ in range(self.runs):
            loss = causal_lm_loss(model, batch)
        self.seen.append((model.training, torch.is_grad_enabled(), torch.get_rng_state()))
        return loss, {"own": 3.0}

    def count_targets(self, batch):
        return causal_lm_loss.count_targets(batch)


def test_modes_random_state_and_dropout():
    """The teacher runs without dropout and leaves the random state alone: the student draws what it would have."""
    model, batch, _ = adapted("llama packed", dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    inner = Recording()
    torch.manual_seed(0)
    _, first = DistillToBase(inner, strength=1.0)(model, batch)
    torch.manual_seed(0)
    assert causal_lm_loss(model, batch).item() == first["task_loss"].item()
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert inner.seen[0][:2] == (True, True)
    assert first["own"] == 3.0
    torch.manual_seed(0)
    _, again = DistillToBase(strength=1.0)(model, batch)
    assert again["distillation"].item() == first["distillation"].item()
    model.model.register_forward_pre_hook(
        lambda *_: torch.rand(5) is None or None
    )  # a model that draws, whatever its mode
    for loss in (inner, DistillToBase(inner, strength=1.0)):
        torch.manual_seed(0)
        loss(model, batch)
    assert torch.equal(inner.seen[-1][2], inner.seen[-2][2])
    assert all(layer.active for layer in model.modules() if hasattr(layer, "adapter_name"))


def test_the_teacher_runs_without_the_models_own_dropout():
    model = tiny_gpt2(dropout=0.5)
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=5))
    moved(model).train()
    batch = collate_padded(ROWS)
    torch.manual_seed(1)
    _, parts = DistillToBase(strength=1.0)(model, batch)
    with torch.no_grad():
        torch.manual_seed(1)
        student, mask = logits_and_mask(model, batch, causal_lm_loss)
        with disabled(model.eval()):
            teacher, _ = logits_and_mask(model, batch, causal_lm_loss)
    expected = F.kl_div(student[mask].log_softmax(-1), teacher[mask].softmax(-1), reduction="batchmean")
    assert_close(parts["distillation"], expected, rtol=1e-4)


def test_one_student_forward_and_one_teacher_forward():
    model, batch, _ = adapted("llama packed")
    runs = []
    model.model.register_forward_hook(lambda m, args, out: runs.append(torch.is_grad_enabled()))
    DistillToBase(strength=1.0)(model, batch)
    assert runs == [False, True]


def test_logits_are_never_all_held(monkeypatch):
    """No tensor of [targets, V] is built: with chunks of 64 rows, the largest has 64."""
    from llmtune.losses import chunked

    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    model, _, _ = adapted("llama packed")
    batch = collate_packed([{"input_ids": list(range(3, 83)), "labels": list(range(3, 83))}] * 3)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 97:
                largest.append(out.shape[0])
            return out

    with Watch():
        total, _ = DistillToBase(strength=1.0)(model, batch)
        total.backward()
    assert 0 < max(largest) <= 64


def test_under_autocast_the_student_keeps_its_gradients():
    """Weights that the teacher casts without gradient must not be handed to the student."""
    model, batch, _ = adapted("llama packed")
    attach(model, LoRA(rank=2, alpha=3, targets=["v_proj"]), name="second")
    model.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = DistillToBase(strength=0.5, teacher=("default",))(model, batch)
    total.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)


def test_a_step_in_evaluation_needs_no_gradient():
    model, batch, _ = adapted("llama packed")
    with torch.no_grad():
        total, parts = DistillToBase(strength=2.0)(model, batch)
    assert_close(total, parts["task_loss"] + 2.0 * parts["distillation"], rtol=1e-6)


@pytest.mark.parametrize("case", ["llama packed", "bert classifier"])
def test_wrapped_models(case):
    model, batch, loss = adapted(case)
    expected, _ = DistillToBase(loss, strength=1.0)(model, batch)
    for wrapped in (nn.DataParallel(model), torch.compile(copy.deepcopy(model), backend="aot_eager")):
        total, _ = DistillToBase(loss, strength=1.0)(wrapped, batch)
        assert_close(total.detach(), expected.detach(), rtol=1e-5)
        total.backward()
    torch._dynamo.reset()


def test_rows_in_any_split_add_up():
    """A mean over targets: batches weighted by their counts give the whole's."""
    model, _, _ = adapted("llama packed")
    distill = DistillToBase(strength=1.0)
    whole, _ = distill(model, collate_packed(ROWS))
    total = 0.0
    for row in ROWS:
        batch = collate_packed([row])
        total = total + distill(model, batch)[0] * distill.count_targets(batch)
    assert_close((total / distill.count_targets(collate_packed(ROWS))).detach(), whole.detach(), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -0.5}, ValueError, "strength must be a finite number, 0 or more; got -0.5"),
        ({"strength": float("nan")}, ValueError, "strength must be a finite number"),
        (
            {"strength": 1.0, "temperature": 0.0},
            ValueError,
            "temperature must be a finite number larger than 0; got 0.0",
        ),
        ({"strength": 1.0, "teacher": "default"}, TypeError, "got the one string 'default'"),
        ({"strength": 1.0, "loss": F.cross_entropy}, TypeError, "the loss needs a count_targets"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        DistillToBase(**options)


def test_bad_models_and_batches():
    distill, batch = DistillToBase(strength=1.0), collate_packed(ROWS)
    with pytest.raises(ValueError, match="this one has none: attach one first"):
        distill(tiny_llama(), batch)
    model, _, _ = adapted("llama packed")
    with pytest.raises(ValueError, match=r'the model has no adapter "defualt".* Did you mean "default"'):
        DistillToBase(strength=1.0, teacher=("defualt",))(model, batch)
    with pytest.raises(ValueError, match=r"distillation needs integer labels, .* got None"):
        distill(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match=r"the loss must run the model exactly once, .* ran it 2 times"):
        DistillToBase(Recording(runs=2), strength=1.0)(model, batch)
    with pytest.raises(ValueError, match="at least one target"):
        distill(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    merge(model)
    with pytest.raises(ValueError, match="merged into the weights and cannot be switched off"):
        distill(model, batch)
    classifier, rows, loss = adapted("bert classifier")
    with pytest.raises(ValueError, match=r"got torch.float32 \[4\]"):
        DistillToBase(loss, strength=1.0)(classifier, {**rows, "labels": torch.rand(4)})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
