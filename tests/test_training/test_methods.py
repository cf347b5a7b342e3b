"""The ten methods of the tutorial: taken from its page, counted, and each compared with a closed form in float64."""

import ast
import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from llmtune.adapters import LoRA, attach
from llmtune.data.collate import collate_padded
from llmtune.errors import NonFiniteError
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.optim.mezo import move_along
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "05-your-own-method.md"
TEXT = PAGE.read_text(encoding="utf-8")
# the name in the page's table: (the class, the most lines it may take)
METHODS = {
    "EWC": ("EWCByHand", 3), "R-Drop": ("RDrop", 4), "distillation": ("Distillation", 5), "replay": ("Replay", 5),
    "SAM": ("SAM", 4), "MAML": ("MAML", 7), "DPO": ("DPO", 8), "A-GEM": ("AGEM", 9), "FreeLB": ("FreeLB", 10),
    "MeZO": ("MeZO", 9),
}  # fmt: skip
KINDS = [kind for kind, _ in METHODS.values()]


def read_page():
    """Define what the page imports and defines, without running its programs; return (names, lines by class)."""
    names, counts = {"__name__": "page"}, {}
    for program in re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT):
        lines = program.splitlines()
        for node in ast.parse(program).body:
            if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef):
                exec(compile(ast.Module([node], []), str(PAGE), "exec"), names)
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
                body = [line for m in methods for line in lines[m.body[0].lineno - 1 : m.end_lineno]]
                counts[node.name] = sum(bool(line.strip()) and not line.strip().startswith("#") for line in body)
    return names, counts


NAMES, COUNTS = read_page()


def text_row(first, step=1, length=7):
    ids = [3 + (first + step * place) % 89 for place in range(length)]
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


ROWS = [text_row(first, length=5 + first % 7) for first in range(23)]
MEMORY = [text_row(first, step=7, length=4 + first % 5) for first in range(13)]
PAIRS = [
    {"chosen": text_row(first, 1, 5 + first % 5), "rejected": text_row(first, 2, 4 + first % 7)} for first in range(11)
]
TASKS = [
    {name: torch.tensor([[text_row(first, step)["input_ids"] for first in side] for side in ((3, 40, 71), (17, 5, 60))])
     for name in ("input_ids", "labels")}
    for step in range(1, 12)
]  # fmt: skip
DATA = {"MAML": (TASKS, default_collate), "DPO": (PAIRS, NAMES["collate_pairs"])}


def run_settings(**changed):
    plain = {"max_steps": 3, "rows_per_step": 8, "learning_rate": 1e-3, "schedule": "constant", "progress": False}
    return LoopSettings(**plain | changed)


def loop_of(kind, model, *, rows=None, collate=None, loss=causal_lm_loss, callbacks=(), penalties=(), **changed):
    """Return a loop of one of the ten, with what it needs."""
    own_rows, own_collate = DATA.get(kind, (ROWS, collate_padded))
    loop = NAMES[kind](
        model, rows or own_rows, settings=run_settings(**changed), collate=collate or own_collate, loss=loss,
        callbacks=callbacks, penalties=penalties,
    )  # fmt: skip
    loop.memory, loop.strength = MEMORY, 3.0
    loop.anchor = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    loop.fisher = {name: p.detach().square() for name, p in model.named_parameters()}
    if kind == "Distillation":
        loop.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        for parameter in loop.teacher.parameters():
            parameter.mul_(1.5)
    return loop


def decoder(kind, make=tiny_gpt2, **options):
    model = make(attention="eager" if kind == "MAML" else "sdpa", **options)
    if kind == "DPO":
        adapt(model)
    return model


def adapt(model):
    torch.manual_seed(0)  # of LoRA's start
    attach(model, LoRA(rank=3, alpha=6, targets="all-linear", dtype=next(model.parameters()).dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def gradients(loop):
    return {name: p.grad.clone() for name, p in loop.model.named_parameters() if p.grad is not None}


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def close(found, wanted, rtol=1e-9):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-12)


class Numbers(nn.Module):
    """A vector to train, in float64, and one that is frozen."""

    def __init__(self, size=5):
        super().__init__()
        self.fixed = nn.Parameter(torch.ones(size, dtype=torch.float64), requires_grad=False)
        self.w = nn.Parameter(torch.linspace(-1, 2, size, dtype=torch.float64))


class RowLoss:
    """The mean over rows x of what `of_row` makes of the vector and x."""

    def __init__(self, of_row):
        self.of_row = of_row

    def __call__(self, model, batch):
        return self.of_row(model.w, batch["x"]).sum(-1).mean()

    def count_targets(self, batch):
        return len(batch["x"])


CURVATURE = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0], dtype=torch.float64)
BOWL = RowLoss(lambda w, x: CURVATURE / 2 * (w - x) ** 2)  # gradient CURVATURE * (w - mean x)
SLOPE = RowLoss(lambda w, x: w * x)  # gradient mean x


def vectors(count, seed=0):
    made = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [{"x": row} for row in made]


def rows_in(batches):
    return torch.cat([batch["x"] for batch in batches])


class Bigrams(nn.Module):
    """A language model whose logits are rows of a table."""

    def __init__(self, tokens=11):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(tokens, tokens, dtype=torch.float64, generator=draw))

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=F.embedding(input_ids, self.table))


class Known(nn.Module):
    """A model that gives known logits, others at each pass."""

    def __init__(self, *passes):
        super().__init__()
        self.passes = list(passes)

    def forward(self, input_ids=None):
        return SimpleNamespace(logits=self.passes.pop(0))


# ---- the page -------------------------------------------------------------------------------------------------------


def test_every_method_is_as_short_as_it_must_be_and_as_the_page_says():
    table = {name: int(lines) for name, lines in re.findall(r"(?m)^\| ([\w-]+) \|.*\| (\d+) \|$", TEXT)}
    assert table == {name: COUNTS[kind] for name, (kind, _) in METHODS.items()}
    assert all(COUNTS[kind] <= most for kind, most in METHODS.values())
    assert max(map(len, TEXT.splitlines())) <= 120


def test_the_methods_are_subclasses_that_leave_the_loop_alone():
    for kind in KINDS:
        assert NAMES[kind].__bases__ == (TrainingLoop,)
    programs = "\n".join(re.findall(r"(?ms)^```python\n(.*?)^```$", TEXT))
    assert not re.search(r"TrainingLoop\.\w+ *=|setattr\(TrainingLoop", programs)


# ---- each against its formula ---------------------------------------------------------------------------------------


def test_ewc_pulls_each_weight_back_by_its_fisher_information():
    for size in (8, 3):
        model = tiny_gpt2().double()
        given = lambda m: m.transformer.wte.weight.square().sum() / 2
        loop = loop_of("EWCByHand", model, rows_per_micro_batch=size, penalties=[given])
        plain = TrainingLoop(model, ROWS, settings=loop.settings, collate=collate_padded)
        plain.accumulate_gradients(plain.micro_batches(0))
        without = gradients(plain)
        loop.accumulate_gradients(loop.micro_batches(0))
        for name, p in model.named_parameters():
            wanted = 3.0 * loop.fisher[name] * (p.detach() - loop.anchor[name])
            wanted = wanted + (p.detach() if name == "transformer.wte.weight" else 0)
            close(p.grad - without[name], wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", ["classes", "tokens"])
def test_r_drop_of_two_known_predictions(shape):
    a, b = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 2, 3, -100, 1], [0, 5, 6, -100, -100], [-100, -100, -100, 4, 2]])
    places = [(row, t, int(labels[row, t + 1])) for row in range(3) for t in range(4) if labels[row, t + 1] != -100]
    if shape == "classes":
        a, b, labels = a[:, 0], b[:, 0], torch.tensor([4, -100, 6])
        places = [(0, ..., 4), (2, ..., 6)]
    loop = loop_of("RDrop", tiny_gpt2())
    loop.alpha, loop.shift = 0.7, int(shape == "tokens")
    total = 0.0
    for row, place, label in places:
        p, q = (z[row][place].exp() / z[row][place].exp().sum() for z in (a, b))
        both = sum(float(x * (x.log() - y.log())) for x, y in [*zip(p, q, strict=True), *zip(q, p, strict=True)])
        total += (-math.log(p[label]) - math.log(q[label]) + 0.7 * both) / 2
    found = loop.compute_loss(Known(a, b), {"labels": labels})
    assert float(found) == pytest.approx(total / len(places), rel=1e-12)


def test_r_drop_draws_dropout_twice():
    model, masks = tiny_gpt2(dropout=0.3).train(), []
    model.transformer.drop.register_forward_hook(lambda m, given, made: masks.append(made == 0))
    loop = loop_of("RDrop", model)
    loop.accumulate_gradients(loop.micro_batches(0))
    assert len(masks) == 2
    assert not torch.equal(*masks)


def test_r_drop_has_the_gradient_of_both_divergences_in_both_draws():
    a, b = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    a, b, targets = a.requires_grad_(), b.requires_grad_(), torch.tensor([1, 5, 3])
    loop = loop_of("RDrop", tiny_gpt2())
    loop.alpha, loop.shift = 0.7, 0
    found = torch.autograd.grad(loop.compute_loss(Known(a, b), {"labels": targets}), (a, b))
    for one, other, gradient in ((a, b, found[0]), (b, a, found[1])):
        p, q = one.detach().softmax(-1), other.detach().softmax(-1)
        ratio = p.log() - q.log()
        of_p_to_q = p * (ratio - (p * ratio).sum(-1, keepdim=True))  # of KL(p || q) in the logits of p
        of_q_to_p = p - q  # of KL(q || p)
        hard = p - F.one_hot(targets, 7)
        close(gradient, (hard + 0.7 * (of_p_to_q + of_q_to_p)) / 2 / 3)


def test_distillation_has_the_gradient_of_soft_and_hard_targets():
    model = Bigrams()
    rows = [{"input_ids": [k, 3, k + 1, 2], "labels": [k, -100, k + 1, 2]} for k in range(5)]
    loop = loop_of("Distillation", model, rows=rows, rows_per_step=5, rows_per_micro_batch=2)
    loop.weight, loop.temperature = 0.3, 2.5
    batches = loop.micro_batches(0)
    loop.accumulate_gradients(batches)
    wanted, n = torch.zeros_like(model.table), 0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            for token, label in zip(ids[:-1], labels[1:], strict=True):
                if label != -100:
                    z, t, n = model.table.detach()[token], loop.teacher.table[token], n + 1
                    hard = z.softmax(-1) - F.one_hot(label, 11)
                    soft = 2.5**2 * ((z / 2.5).softmax(-1) - (t / 2.5).softmax(-1)) / 2.5
                    wanted[token] += 0.7 * hard + 0.3 * soft
    assert n == 10
    close(model.table.grad, wanted / n)
    assert all(parameter.grad is None for parameter in loop.teacher.parameters())


def test_replay_adds_its_share_of_old_rows_which_depend_on_seed_and_step_alone():
    loop, plain = loop_of("Replay", tiny_gpt2()), TrainingLoop(
        tiny_gpt2(), ROWS, settings=run_settings(), collate=collate_padded
    )  # fmt: skip
    loop.replayed = 5
    seen = []
    for step in (4, 2, 4):
        batches, new = loop.micro_batches(step), plain.micro_batches(step)
        assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(batches, new, strict=False))
        old = [row.tolist() for batch in batches[len(new) :] for row in batch["input_ids"]]
        old = [[token for token in row if token] for row in old]
        assert len(old) == 5 == len({tuple(row) for row in old})
        assert all(row in [kept["input_ids"] for kept in MEMORY] for row in old)
        seen.append(old)
    assert seen[0] == seen[2] != seen[1]
    other = loop_of("Replay", tiny_gpt2(), seed=1)
    other.replayed = 5
    assert not torch.equal(other.micro_batches(4)[-1]["input_ids"], loop.micro_batches(4)[-1]["input_ids"])
    small = loop_of("Replay", tiny_gpt2(), rows_per_micro_batch=3)
    assert [len(batch["labels"]) for batch in small.micro_batches(0)] == [3, 3, 2, 3, 1]


def test_sam_takes_the_gradient_uphill_and_leaves_the_weights_where_they_were():
    for size in (7, 3, 1):
        model = Numbers()
        loop = loop_of(
            "SAM",
            model,
            rows=vectors(11),
            collate=default_collate,
            loss=BOWL,
            rows_per_step=7,
            rows_per_micro_batch=size,
        )
        loop.rho, before, batches = 0.3, model.w.detach().clone(), loop.micro_batches(0)
        metrics = loop.accumulate_gradients(batches)
        x = rows_in(batches)
        g = CURVATURE * (before - x.mean(0))
        close(model.w.grad, CURVATURE * (before + 0.3 * g / g.norm() - x.mean(0)))
        assert torch.equal(model.w, before)
        close(metrics["loss"].double(), BOWL.of_row(before, x).sum(-1).mean(), rtol=1e-6)


def test_sam_restores_every_bit_even_when_the_second_run_fails():
    class Failing(RowLoss):
        calls = 0

        def __call__(self, model, batch):
            self.calls += 1
            if self.calls == 2:
                raise RuntimeError("seeded")
            return super().__call__(model, batch)

    model = Numbers()
    loop = loop_of("SAM", model, rows=vectors(11), collate=default_collate, loss=Failing(BOWL.of_row))
    before = weights(model)
    with pytest.raises(RuntimeError, match="seeded"):
        loop.accumulate_gradients(loop.micro_batches(0))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_sam_draws_the_same_dropout_twice_and_goes_on_as_after_one_pass():
    model, masks = tiny_gpt2(dropout=0.3).train(), []
    model.transformer.drop.register_forward_hook(lambda m, given, made: masks.append(made == 0))
    after = []
    for kind in (NAMES["SAM"], TrainingLoop):
        loop = kind(model, ROWS, settings=run_settings(rows_per_micro_batch=4), collate=collate_padded)
        torch.manual_seed(3)
        loop.accumulate_gradients(loop.micro_batches(0))
        after.append(torch.get_rng_state())
    first, second, again, again_second = masks[:4]
    assert torch.equal(first, again)
    assert torch.equal(second, again_second)
    assert first.shape != second.shape or not torch.equal(first, second)
    assert torch.equal(*after)


def test_maml_goes_through_the_inner_step():
    model, rate = Bigrams(), 3.0
    model.table.data.mul_(2)
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 5, (2, 3, 7), generator=draw) for _ in range(5)]
    tasks = [{"input_ids": one, "labels": one} for one in ids]
    theta = model.table.detach().clone()

    def slope_and_curvature(table, ids):
        p, slope = table.softmax(-1), torch.zeros_like(table)
        curvature, n = torch.zeros(11, 11, 11, dtype=torch.float64), ids[:, 1:].numel()
        for row in ids:
            for token, label in pairwise(row):
                slope[token] += (p[token] - F.one_hot(label, 11)) / n
                curvature[token] += (p[token].diag() - torch.outer(p[token], p[token])) / n
        return slope, curvature

    wanted, first_order = torch.zeros_like(theta), torch.zeros_like(theta)
    for one in tasks:
        support, query = one["input_ids"]
        inner, curvature = slope_and_curvature(theta, support)
        outer, _ = slope_and_curvature(theta - rate * inner, query)
        first_order += outer / 5
        wanted += (outer - rate * (curvature @ outer[..., None]).squeeze(-1)) / 5
    for size in (5, 2):
        loop = loop_of("MAML", model, rows=tasks, rows_per_step=5, rows_per_micro_batch=size)
        loop.inner_rate = rate
        metrics = loop.accumulate_gradients(loop.micro_batches(0))
        assert metrics["targets"] == 5
        close(model.table.grad, wanted)
    assert float((wanted - first_order).norm() / wanted.norm()) > 0.1
    loop.eval_data = tasks
    assert loop.evaluate()["eval_loss"] == pytest.approx(float(metrics["loss"]), rel=1e-6)


def test_dpo_is_the_papers_loss_against_the_bare_model():
    base = tiny_gpt2().double()
    model = adapt(copy.deepcopy(base))
    loop = loop_of("DPO", model, rows_per_step=7, rows_per_micro_batch=3)
    loop.beta = 0.4
    batches = loop.micro_batches(0)
    metrics = loop.accumulate_gradients(batches)
    chosen = [PAIRS[index] for index in loop.row_indices(0)]

    def log_p(module, row):
        ids = torch.tensor([row["input_ids"]])
        log_p = module(ids, use_cache=False).logits[0].log_softmax(-1)
        return sum(log_p[t, row["labels"][t + 1]] for t in range(len(ids[0]) - 1) if row["labels"][t + 1] != -100)

    gains = []
    for pair in chosen:
        ratio = {side: log_p(model, row) - log_p(base, row).detach() for side, row in pair.items()}
        gains.append(0.4 * (ratio["chosen"] - ratio["rejected"]))
    loss = sum(torch.log1p(torch.exp(-gain)) for gain in gains) / 7
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for (name, _), wanted in zip(named.items(), torch.autograd.grad(loss, named.values()), strict=True):
        close(gradients(loop)[name], wanted, rtol=1e-7)
    assert float(metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert float(metrics["preferred"]) == pytest.approx(sum(float(gain > 0) for gain in gains) / 7, rel=1e-6)
    assert metrics["targets"] == 7
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_dpo_reads_its_reference_without_dropout():
    model, modes = adapt(tiny_gpt2(dropout=0.3)).train(), []
    model.transformer.drop.register_forward_pre_hook(
        lambda m, given: modes.append((m.training, torch.is_grad_enabled()))
    )
    loop = loop_of("DPO", model)
    loop.accumulate_gradients(loop.micro_batches(0))
    assert modes == [(False, False), (True, True)]
    assert model.training


@pytest.mark.parametrize("conflict", [True, False])
def test_a_gem_takes_out_what_points_against_the_memory(conflict):
    r = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    rows = [{"x": row["x"] + (-r if conflict else r)} for row in vectors(11)]
    model = Numbers()
    loop = loop_of(
        "AGEM", model, rows=rows, collate=default_collate, loss=SLOPE, rows_per_step=7, rows_per_micro_batch=3
    )
    loop.memory = [{"x": r}] * 13
    metrics = loop.accumulate_gradients(loop.micro_batches(0))
    g = rows_in(loop.micro_batches(0)).mean(0)
    dot = g @ r
    assert bool(dot < 0) == conflict
    close(metrics["agreement"], dot)
    if conflict:
        close(model.w.grad, g - dot / (r @ r) * r)
        assert float(model.w.grad @ r) >= -1e-12
    else:
        plain = TrainingLoop(model, rows, settings=loop.settings, collate=default_collate, loss=SLOPE)
        plain.accumulate_gradients(plain.micro_batches(0))
        with_memory = loop.accumulate_gradients(loop.micro_batches(0)) and model.w.grad.clone()
        plain.accumulate_gradients(plain.micro_batches(0))
        assert torch.equal(model.w.grad, with_memory)


def test_a_gem_remembers_other_rows_at_each_step_and_the_same_again():
    loop = loop_of("AGEM", Numbers(), rows=vectors(11), collate=default_collate, loss=SLOPE)
    loop.memory, loop.remembered, agreed = vectors(13, seed=1), 3, []
    for loop.step in (1, 2, 1):
        agreed.append(float(loop.accumulate_gradients(loop.micro_batches(0))["agreement"]))
    assert agreed[0] == agreed[2] != agreed[1]


class Words(nn.Module):
    """A classifier of a bag of words, curved in its embeddings; it notes the embeddings that it is given."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(101, 5), nn.Linear(5, 3)
        self.double()
        self.seen = []

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        self.seen.append(inputs_embeds.detach().clone())
        bag = (torch.tanh(inputs_embeds) * attention_mask[..., None]).sum(1)
        return SimpleNamespace(logits=self.head(bag))


@pytest.mark.parametrize("epsilon", [0.9, 0.25])
def test_free_lb_climbs_within_its_ball_and_learns_from_every_place(epsilon):
    torch.manual_seed(0)
    model = Words()
    rows = [{"input_ids": row["input_ids"], "labels": k % 3} for k, row in enumerate(ROWS)]
    loop = loop_of("FreeLB", model, rows=rows, loss=classification_loss, rows_per_step=7)
    assert loop.start == loop.epsilon  # as in the paper
    loop.epsilon, loop.start, loop.rate, loop.ascents = epsilon, 0.2, 0.2, 4
    batch = loop.micro_batches(0)[0]
    loop.accumulate_gradients([batch])
    words, real = model.embed(batch["input_ids"]), batch["attention_mask"][..., None]
    deltas = [seen - words.detach() for seen in model.seen]
    assert len(deltas) == 4
    for row, first in enumerate(deltas[0]):
        n = int(real[row].sum())
        assert float(first[:n].abs().max()) <= 0.2 / math.sqrt(5 * n)
        assert float(first[:n].abs().max()) > 0.7 * 0.2 / math.sqrt(5 * n)
        assert bool((first[n:].abs() < 1e-15).all())

    def loss_at(delta):
        bag = (torch.tanh(words + delta) * real).sum(1)
        log_p = model.head(bag).log_softmax(-1)
        return -sum(log_p[row, label] for row, label in enumerate(batch["labels"])) / 7

    clipped = 0
    for delta, following in pairwise(deltas):
        place = delta.clone().requires_grad_()
        slope = torch.autograd.grad(loss_at(place), place, retain_graph=True)[0]
        for row in range(7):
            moved = delta[row] + 0.2 * slope[row] / slope[row].norm()
            clipped += bool(moved.norm() > epsilon)
            close(following[row], moved * min(1.0, epsilon / float(moved.norm())), rtol=1e-6)
            assert float(following[row].norm()) <= epsilon * (1 + 1e-9)
    assert (clipped > 0) == (epsilon == 0.25)
    wanted = torch.autograd.grad(sum(loss_at(delta) for delta in deltas) / 4, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        close(parameter.grad, gradient)


def test_free_lb_holds_dropout_still_while_it_climbs():
    model, masks = tiny_gpt2(dropout=0.3).train(), []
    model.transformer.h[0].mlp.dropout.register_forward_hook(lambda m, given, made: masks.append(made == 0))
    loop = loop_of("FreeLB", model, rows_per_micro_batch=4)
    loop.accumulate_gradients(loop.micro_batches(0))
    assert len(masks) == 6
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert masks[0].shape != masks[3].shape or not torch.equal(masks[0], masks[3])


def drawn(loop, step):
    """The z of a step: one normal draw for each trained tensor, in order."""
    found = [torch.zeros_like(p) for p in loop.model.parameters() if p.requires_grad]
    move_along(found, 1.0, seed=loop.settings.seed, step=step)
    return found


def test_mezo_measures_the_slope_along_z_and_goes_down_it():
    model = Numbers()
    model.more = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    loss = RowLoss(lambda w, x: CURVATURE / 2 * (w - x) ** 2)
    loop = loop_of(
        "MeZO", model, rows=vectors(11), collate=default_collate, loss=loss, rows_per_step=7, rows_per_micro_batch=3,
        learning_rate=0.01,
    )  # fmt: skip
    for loop.step in (0, 1):
        before, batches = weights(model), loop.micro_batches(loop.step)
        x, (z, z_more) = rows_in(batches), drawn(loop, loop.step)
        gradient = CURVATURE * (before["w"] - x.mean(0))
        metrics = loop.training_step(batches)
        assert metrics["slope"] == pytest.approx(float(gradient @ z), rel=1e-9)  # exact: the loss is a quadratic
        close(model.w.detach(), before["w"] - 0.01 * (gradient @ z) * z, rtol=1e-8)
        close(model.more.detach(), before["more"] - 0.01 * (gradient @ z) * z_more, rtol=1e-8)
        assert torch.equal(model.fixed, before["fixed"])
        assert all(isinstance(value, float | int) for value in metrics.values())
    assert not torch.equal(drawn(loop, 0)[0], drawn(loop, 1)[0])


def test_mezo_restores_to_within_rounding_and_runs_without_dropout():
    model, modes = tiny_gpt2(dropout=0.3).train(), []
    model.transformer.drop.register_forward_pre_hook(lambda m, given: modes.append(m.training))
    loop = loop_of("MeZO", model, learning_rate=0.0)
    before = weights(model)
    loop.training_step(loop.micro_batches(0))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=1e-6)
        assert p.grad is None
    assert modes == [False, False]
    assert model.training


def test_mezo_puts_the_weights_back_where_the_loss_is_not_finite():
    model = Numbers()
    loop = loop_of(
        "MeZO", model, rows=vectors(11), collate=default_collate, loss=RowLoss(lambda w, x: w * float("nan"))
    )
    before = weights(model)
    with pytest.raises(NonFiniteError, match="the losses on both sides are nan and nan; the weights are back"):
        loop.training_step(loop.micro_batches(0))
    close(model.w.detach(), before["w"])


# ---- the promises of the loop ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "MeZO"])
def test_the_gradient_does_not_depend_on_the_cut(kind):
    found = []
    for size in (8, 4, 1):
        model = decoder("MAML" if kind == "MAML" else "").double()
        loop = loop_of(kind, adapt(model) if kind == "DPO" else model, rows_per_micro_batch=size)
        loop.start = 0.0  # of FreeLB
        loop.accumulate_gradients(loop.micro_batches(0))
        found.append(gradients(loop))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, wanted in found[0].items():
            close(other[name], wanted, rtol=1e-8)


def test_the_slope_that_mezo_measures_does_not_depend_on_the_cut():
    slopes = []
    for size in (8, 4, 1):
        loop = loop_of("MeZO", tiny_gpt2().double(), rows_per_micro_batch=size)
        slopes.append(loop.training_step(loop.micro_batches(0))["slope"])
    assert slopes == pytest.approx([slopes[0]] * 3, rel=1e-9)


class Wrapper(nn.Module):
    """What torch.compile puts around a model, without compiling."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod, self.calls = model, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self._orig_mod(*args, **kwargs)


@pytest.mark.parametrize(
    ("kind", "passes"), [("RDrop", 2), ("Distillation", 1), ("DPO", 2), ("FreeLB", 3), ("MAML", 2 * 8)]
)
def test_forward_passes_go_through_the_model_that_is_given(kind, passes):
    model = decoder(kind).double()
    loop, bare = loop_of(kind, model), []
    loop.start = 0.0
    batch, wrapper = loop.micro_batches(0)[0], Wrapper(model)
    result = loop.compute_loss(model, batch)
    model.register_forward_pre_hook(lambda m, given: bare.append(1))
    wrapped = loop.compute_loss(wrapper, batch)
    assert wrapper.calls == len(bare) == passes
    close(*(made[0] if isinstance(made, tuple) else made for made in (wrapped, result)))


class StopAt(Callback):
    """Ends a run after some steps, as a crash would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, loop, metrics):
        if loop.step == self.step:
            loop.save()
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [*KINDS, "RunningTeacher"])
def test_a_resumed_run_ends_with_the_same_bits(kind, tmp_path):
    ends = []
    for folder, stops in (("whole", ()), ("cut", (2,))):
        for stop in (*stops, None):
            base = "Distillation" if kind == "RunningTeacher" else kind
            loop = loop_of(
                base, decoder(kind, dropout=0.1), max_steps=4, folder=tmp_path / folder, callbacks=[StopAt(stop)]
            )
            if kind == "RunningTeacher":
                own = NAMES[kind](
                    loop.model, ROWS, settings=loop.settings, collate=collate_padded, callbacks=loop.callbacks
                )
                own.teacher, loop = loop.teacher, own
            try:
                loop.fit(resume=True)
            except KeyboardInterrupt:
                assert stop == 2
        ends.append(weights(loop.model))
        assert [row["step"] for row in loop.history] == [1, 2, 3, 4]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# ---- on models ------------------------------------------------------------------------------------------------------


def trains(loop):
    before = weights(loop.model)
    history = loop.fit()
    assert len(history) == 3
    assert all(math.isfinite(row["loss"]) for row in history)
    changed = {name for name, p in loop.model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name, p in loop.model.named_parameters() if not p.requires_grad}
    assert changed
    assert not changed & frozen


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("kind", KINDS)
def test_trains_a_decoder(kind, make):
    trains(loop_of(kind, decoder(kind, make), rows_per_micro_batch=4))


@pytest.mark.parametrize("kind", ["RDrop", "FreeLB", "SAM", "MeZO"])
def test_trains_under_lora(kind):
    trains(loop_of(kind, adapt(tiny_llama()), rows_per_micro_batch=4))


@pytest.mark.parametrize("kind", ["RDrop", "FreeLB", "SAM", "Distillation", "AGEM"])
def test_trains_a_classifier(kind):
    rows = [{"input_ids": row["input_ids"], "labels": k % 3} for k, row in enumerate(ROWS)]
    loop = loop_of(kind, tiny_bert(labels=3, dropout=0.1), rows=rows, loss=classification_loss, rows_per_micro_batch=4)
    loop.shift, loop.memory = 0, rows[:11]
    trains(loop)


def test_distils_an_encoder_decoder():
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"][1:], "decoder_input_ids": [0, *row["labels"][1:-1]]}
            for row in ROWS]  # fmt: skip
    loop = loop_of("Distillation", tiny_t5(), rows=rows, loss=sequence_to_sequence_loss)
    loop.shift = 0
    batch = loop.micro_batches(0)[0]
    kept = batch["labels"] != -100
    z, t = (m(**batch).logits[kept].double() for m in (loop.model, loop.teacher))
    soft = 4 * ((t / 2).softmax(-1) * ((t / 2).log_softmax(-1) - (z / 2).log_softmax(-1))).sum(-1).mean()
    hard = sequence_to_sequence_loss(loop.model, batch)
    close(loop.compute_loss(loop.model, batch).double(), (hard + soft) / 2, rtol=1e-5)
    trains(loop)
