import copy
import re
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.regularizers.smart import SmartLoss, smart_loss
from llmtune.regularizers.worst_noise import Search
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.types import LossFunction

ROWS = uneven_rows(5)
CLASSES = [{**row, "labels": (2, -100, 0, 1, 2)[index]} for index, row in enumerate(ROWS)]
PADDED = collate_padded(ROWS)
CASES = {
    "llama padded": (tiny_llama, PADDED, CausalLMLoss(label_smoothing=0.1)),
    "llama padded left": (tiny_llama, collate_padded(ROWS, side="left"), causal_lm_loss),
    "gpt2": (tiny_gpt2, PADDED, causal_lm_loss),
    "bert masked": (tiny_bert, PADDED, masked_lm_loss),
    "bert classifier": (partial(tiny_bert, labels=3), collate_padded(CLASSES), classification_loss),
    "t5": (tiny_t5, PADDED, sequence_to_sequence_loss),
}


def known_start(self, zeros, real, examples, generator=None):
    """A first noise that depends on nothing but the place in the embedding: the same in any split, padded or packed."""
    pattern = torch.sin(1 + torch.arange(zeros.shape[-1], dtype=zeros.dtype))
    return (zeros + self.start * self.epsilon * pattern) * real[..., None]


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(Search, "first", known_start)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_worst_direction_of_a_linear_model(norm, steps):
    """Two classes, log-odds w . x: the divergence grows with |w . d|, so the worst d is +- epsilon times w / ||w||, or
    sign(w), and there the divergence is (p - q) times epsilon ||w||, or epsilon sum |w|."""
    w, x = torch.randn(2, 5, 3, dtype=torch.float64)
    x = x[None].requires_grad_()

    def predict(e):
        odds = (e * w).sum((1, 2))
        return torch.stack([torch.zeros_like(odds), odds], -1)

    found = smart_loss(predict, x, epsilon=0.3, steps=steps, norm=norm, start=1e-5)
    size = 0.3 * (w.abs().sum() if norm == "linf" else w.norm())
    here = (x * w).sum().detach()
    sides = torch.stack([((here + s * size).sigmoid() - here.sigmoid()) * s * size for s in (1, -1)])
    assert float((found / sides - 1).abs().min()) < (1e-10 if norm == "linf" else 1e-8)  # it climbs on either side
    found.backward()
    assert x.grad.abs().sum() > 0


def test_the_noise_stays_in_its_ball_and_off_the_padding():
    real = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    w = torch.randn(5, 7, dtype=torch.float64)
    for norm in ("linf", "l2"):
        for steps, step_size, start in ((1, None, 0.1), (1, 0.01, 1.0), (4, 5.0, 0.5)):
            seen = []

            def predict(e, seen=seen):
                seen.append(e.detach())
                return torch.stack([(e * w).sum((1, 2)), (e * w * w).sum((1, 2))], -1)

            x = torch.zeros(2, 5, 7, dtype=torch.float64)
            smart_loss(predict, x, epsilon=0.3, steps=steps, step_size=step_size, start=start, norm=norm, real=real)
            assert len(seen) == steps + 2
            for noise in seen[1:]:
                sizes = noise.abs().amax((1, 2)) if norm == "linf" else noise.flatten(1).norm(dim=1)
                assert bool((sizes > 0).all())
                assert bool((sizes <= 0.3 + 1e-12).all())
                assert not noise[~real].any()
            if step_size is None:  # one step reaches the edge
                assert_close(sizes, torch.full_like(sizes, 0.3), rtol=1e-9)


def test_gradients_flow_through_both_sides():
    """At a fixed noise the gradient is that of the divergence by its two predictions, and neither is left out."""
    w = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 1, 7, dtype=torch.float64)
    seen = []

    def predict(e):
        seen.append(e.detach()[:, 0])
        return (e @ w)[:, 0]

    smart_loss(predict, x, epsilon=0.3).backward()
    clean, moved = seen[0], seen[-1]
    v = w.detach().requires_grad_()
    p, q = (clean @ v).softmax(-1), (moved @ v).softmax(-1)
    ((p - q) * (p / q).log()).sum(-1).mean().backward()
    assert_close(w.grad, v.grad, rtol=1e-10)
    one = w.detach().requires_grad_()
    p = (clean @ one).softmax(-1).detach()
    q = (moved @ one).softmax(-1)
    ((p - q) * (p / q).log()).sum(-1).mean().backward()
    assert (one.grad - v.grad).norm() > 0.1 * v.grad.norm()


def all_logits(model, batch, loss, noise):
    """Return (logits, targets) at the labelled places, with noise on embeddings given by name."""
    ids, targets = batch["input_ids"], batch["labels"]
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids) + noise, "attention_mask": batch["attention_mask"]}
    if loss is sequence_to_sequence_loss:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=targets)
    logits = model(**inputs).logits
    if isinstance(loss, CausalLMLoss):
        logits, targets = logits[:, :-1], targets[:, 1:]
    return logits[targets != -100], targets[targets != -100]


def both_ways(a, b):
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return sum(F.kl_div(x, y, reduction="none", log_target=True).sum() for x, y in ((p, q), (q, p)))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_formula(case, norm, known):
    """Written out with `inputs_embeds` and all logits, in float64, two steps."""
    make, batch, loss = CASES[case]
    model = make().double()
    smart = SmartLoss(loss, strength=0.7, epsilon=0.2, steps=2, step_size=0.15, norm=norm)
    total, parts = smart(model, batch)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    real = batch["attention_mask"][..., None].double()
    clean, t = all_logits(model, batch, loss, 0.0)
    noise = 0.02 * torch.sin(1 + torch.arange(model.get_input_embeddings().weight.shape[1]).double()) * real
    for _ in range(2):
        noise = noise.detach().requires_grad_()
        divergence = both_ways(clean.detach(), all_logits(model, batch, loss, noise)[0])
        slope = torch.autograd.grad(divergence, noise)[0] * real
        with torch.no_grad():
            if norm == "linf":
                noise = (noise + 0.15 * slope.sign()).clamp(-0.2, 0.2)
            else:
                noise = noise + 0.15 * slope / slope.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
                noise = noise / (noise.flatten(1).norm(dim=1) / 0.2).clamp(min=1.0)[:, None, None]
    moved, _ = all_logits(model, batch, loss, noise)
    smooth = both_ways(clean, moved) / len(t)
    task = F.cross_entropy(clean, t, label_smoothing=getattr(loss, "label_smoothing", 0.0))
    (task + 0.7 * smooth).backward()
    assert smooth > 1e-3
    assert_close(parts["smart"], smooth.detach(), rtol=1e-5)  # some models compute their norms in float32
    assert_close(parts["task_loss"], task.detach(), rtol=1e-6)
    assert_close(total.detach(), (task + 0.7 * smooth).detach(), rtol=1e-6)
    largest = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert float((found[name] - parameter.grad).abs().max()) <= 1e-5 * largest, name
    assert isinstance(smart, LossFunction)
    assert smart.count_targets(batch) == loss.count_targets(batch) == len(t)


def test_the_function_gives_what_the_loss_gives(known):
    model, batch = tiny_bert(labels=3).double(), collate_padded(CLASSES)
    kept = batch["labels"] != -100
    predict = lambda e: model(inputs_embeds=e, attention_mask=batch["attention_mask"]).logits[kept]
    words = model.get_input_embeddings()(batch["input_ids"])
    for norm in ("linf", "l2"):
        knobs = {"epsilon": 0.2, "steps": 3, "step_size": 0.1, "norm": norm}
        found = smart_loss(predict, words, **knobs, real=batch["attention_mask"].bool())
        _, parts = SmartLoss(classification_loss, strength=1.0, **knobs)(model, batch)
        assert_close(found.detach(), parts["smart"], rtol=1e-8)


def gradient_of(loss, model, batches):
    counts = [loss.count_targets(batch) for batch in batches]
    model.zero_grad()
    for batch, count in zip(batches, counts, strict=True):
        if count:
            (loss(model, batch)[0] * count / sum(counts)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_rows_in_any_split_padded_or_packed_give_one_gradient(norm, known):
    """A ball belongs to an example: to a row, or to a document of a packed row."""
    smart = SmartLoss(strength=2.0, epsilon=0.4, norm=norm)
    model = tiny_gpt2().double()
    whole = gradient_of(smart, model, [PADDED])
    for batches in ([collate_padded([row]) for row in ROWS], [collate_packed(ROWS)]):
        assert_close(gradient_of(smart, model, batches), whole, rtol=1e-8)
    halves = [collate_packed(ROWS[:2]), collate_padded(ROWS[2:])]
    assert_close(gradient_of(smart, model, halves), whole, rtol=1e-8)


def test_dropout_is_the_same_in_all_passes():
    """A tiny ball gives a tiny divergence although dropout is on; the random state moves on as after plain passes."""
    model = tiny_gpt2(dropout=0.3).train()
    _, parts = SmartLoss(strength=1.0, epsilon=1e-4)(model, PADDED)
    assert 0 < parts["smart"] < 1e-4
    before = torch.get_rng_state()
    first = SmartLoss(strength=1.0, epsilon=0.1)(model, PADDED)[0]
    assert not torch.equal(before, torch.get_rng_state())
    assert SmartLoss(strength=1.0, epsilon=0.1)(model, PADDED)[0].item() != first.item()
    torch.set_rng_state(before)
    assert SmartLoss(strength=1.0, epsilon=0.1)(model, PADDED)[0].item() == first.item()


def test_leaves_no_trace_and_is_the_plain_loss_in_evaluation():
    model = tiny_llama()
    kinds = [type(m) for m in model.modules()]
    smart = SmartLoss(strength=1.0, epsilon=0.1)
    smart(model, PADDED)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert smart(model, PADDED).item() == causal_lm_loss(model, PADDED).item()


def test_adapters_and_checkpointing_and_autocast():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=4))
    smart = SmartLoss(strength=1.0, epsilon=0.1)
    torch.manual_seed(3)
    smart(model.train(), PADDED)[0].backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("lora" in name for name in plain)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    smart(model, PADDED)[0].backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_close(parameter.grad, plain[name], rtol=1e-4)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, parts = smart(model, PADDED)
    total.backward()
    assert total.dtype == parts["smart"].dtype == torch.float32


@pytest.mark.slow
def test_a_compiled_model_feels_the_noise():
    model, batch = tiny_bert(labels=3), collate_padded(CLASSES)
    once = torch.compile(copy.deepcopy(model), backend="aot_eager")
    once(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    values = []
    for called in (model, once):
        torch.manual_seed(0)
        values.append(SmartLoss(classification_loss, strength=1.0, epsilon=0.1)(called, batch)[1]["smart"].item())
    torch._dynamo.reset()
    assert values[0] > 0
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_noise_that_rounding_swallows_raises():
    with pytest.raises(ValueError, match="the noise is lost in the rounding of torch\\.bfloat16"):
        SmartLoss(strength=1.0, epsilon=1e-6)(tiny_llama().bfloat16(), PADDED)
    with pytest.raises(ValueError, match="the noise is lost in the rounding of torch\\.bfloat16"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            SmartLoss(strength=1.0, epsilon=1e-6)(tiny_llama(), PADDED)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strength": -1.0}, ValueError, "strength must be a finite number, 0 or more; got -1.0"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number larger than 0; got 0.0"),
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1; got 0"),
        ({"steps": 1.5}, ValueError, "steps must be a whole number of at least 1; got 1.5"),
        ({"step_size": 0.0}, ValueError, "step_size must be a finite number larger than 0, or None; got 0.0"),
        ({"start": 0.0}, ValueError, "start must be larger than 0 (there the slope is 0) and at most 1; got 0.0"),
        ({"norm": "l1"}, ValueError, 'norm must be "l2" or "linf"; got \'l1\''),
        ({"loss": F.cross_entropy}, TypeError, "SMART compares predictions, so its loss must be one"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SmartLoss(**{"strength": 1.0, "epsilon": 0.1, **options})


def test_bad_inputs():
    smart, model = SmartLoss(strength=1.0, epsilon=0.1), tiny_llama()
    with pytest.raises(ValueError, match=re.escape('the batch needs "input_ids" [B, T]; got None')):
        smart(model, {"labels": PADDED["labels"]})
    with pytest.raises(ValueError, match=re.escape("the attention mask must say of each token [5, 7]")):
        smart(model, {**PADDED, "attention_mask": torch.ones(5, 1, 7, 7)})
    with pytest.raises(ValueError, match="Linear has no embedding of tokens"):
        smart(torch.nn.Linear(3, 5), PADDED)
    with pytest.raises(ValueError, match=re.escape("expected embeddings [B, T, E] and real [B, T]; got [3, 5]")):
        smart_loss(lambda e: e, torch.zeros(3, 5), epsilon=0.1)
    with pytest.raises(ValueError, match=re.escape("got [3, 5, 2] and real [3, 2]")):
        smart_loss(lambda e: e, torch.zeros(3, 5, 2), epsilon=0.1, real=torch.ones(3, 2, dtype=torch.bool))
