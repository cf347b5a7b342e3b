"""AdaLoRA: the formula, PEFT's files both ways, the budget of ranks step for step with PEFT's, the penalty."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmtune.adapters import (
    AdaLoRA,
    AdaLoRAConv1D,
    AdaLoRALinear,
    AdaLoRAOrthogonality,
    LoRA,
    RankBudget,
    adapter_parameters,
    attach,
    kept_triplets,
    load,
    merge,
    save,
    trim_ranks,
)
from llmtune.adapters.adalora_config import adalora_layers
from llmtune.adapters.attach import record_of
from llmtune.data import collate_packed
from llmtune.errors import CheckpointError
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.penalties import (
    penalty_has_its_gradient,
    penalty_is_the_same_twice,
    penalty_leaves_no_trace,
)
from llmtune.training import LoopSettings, TrainingLoop

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
adalora = partial(AdaLoRA, initial_rank=5, target_rank=2, alpha=7, total_steps=9)
CASES = {
    "llama all linear": (tiny_llama, {}),
    "llama suffixes": (tiny_llama, {"targets": ["q_proj", "v_proj"], "dropout": 0.3}),
    "llama excluded": (tiny_llama, {"targets": ["q_proj", "k_proj"], "exclude": ["layers.0.self_attn.q_proj"]}),
    "llama head trained whole": (tiny_llama, {"targets": ["q_proj"], "train_modules": ["lm_head"]}),
    "llama schedule": (
        tiny_llama,
        {"targets": r".*layers\.1\..*(gate|up)_proj", "warmup_steps": 2, "final_steps": 3, "interval": 2, "beta1": 0.7,
         "beta2": 0.6, "orthogonality": 0.1},
    ),
    "gpt2": (tiny_gpt2, {"targets": ["c_attn", "c_proj"]}),
    "classifier": (partial(tiny_bert, labels=3), {"targets": ["query", "value"], "train_modules": ["classifier"]}),
    "t5": (tiny_t5, {"targets": ["q", "v", "wi", "wo"]}),
}  # fmt: skip
TO_PEFT = {
    "initial_rank": "init_r", "target_rank": "target_r", "alpha": "lora_alpha", "total_steps": "total_step",
    "warmup_steps": "tinit", "final_steps": "tfinal", "interval": "deltaT", "orthogonality": "orth_reg_weight",
    "targets": "target_modules", "exclude": "exclude_modules", "dropout": "lora_dropout",
    "train_modules": "modules_to_save",
}  # fmt: skip


def output(model):
    inputs = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def move(parameters, amount=0.3):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_((amount * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def close(one, other, tolerance=1e-6):
    assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def same_model(model, theirs):
    """The same outputs. The scaling is applied in another order than PEFT's: float64 shows that it is nothing else."""
    close(output(model), output(theirs), 3e-6)
    close(output(copy.deepcopy(model).double()), output(copy.deepcopy(theirs).double()), 1e-13)


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


def entries(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def to_peft(make, options):
    options = {"initial_rank": 5, "target_rank": 2, "alpha": 7, "total_steps": 9, "targets": "all-linear"} | options
    return peft.get_peft_model(
        make(), peft.AdaLoraConfig(**{TO_PEFT.get(name, name): value for name, value in options.items()})
    )


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


# --- the layer and the files ----------------------------------------------------------------------------------------


def test_the_formula():
    torch.manual_seed(0)
    layer = AdaLoRALinear(nn.Linear(5, 7, dtype=torch.float64), rank=3, alpha=4, initial_rank=11, dtype=torch.float64)
    move(trained(layer))
    x = torch.randn(2, 5, dtype=torch.float64)
    a, e, b = layer.lora_a, layer.lora_e, layer.lora_b
    delta = 4 / (11 + 1e-5) * b @ torch.diag(e) @ a
    torch.testing.assert_close(layer(x), layer.base(x) + x @ delta.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.deltas()["weight"], delta, rtol=1e-12, atol=1e-12)
    left, right, scaling = layer.low_rank()
    torch.testing.assert_close(scaling * left @ right, delta, rtol=1e-12, atol=1e-12)
    assert layer.file_tensors("x")["base_model.model.x.lora_E"].shape == (3, 1)


def test_what_we_write_peft_reads(case, tmp_path):
    make, options = case
    model = make()
    attach(model, adalora(**options))
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    same_model(model, theirs)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = entries(tmp_path / "ours"), entries(tmp_path / "theirs")
    assert ours.keys() | {"peft_version"} == back.keys() | {"peft_version"}
    for key in (*TO_PEFT.values(), "rank_pattern", "peft_type", "r"):
        if key not in ("target_modules", "exclude_modules"):
            assert ours[key] == back[key]


def test_what_peft_writes_we_read(case, tmp_path):
    make, options = case
    theirs = to_peft(make, options)
    move(trained(theirs))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    model = make()
    report = load(model, tmp_path / "theirs")
    assert not report.missing
    assert not report.unexpected
    same_model(model, theirs)
    save(model, tmp_path / "again")
    assert written(tmp_path / "again") == written(tmp_path / "theirs")
    config = record_of(model, "default").configs["default"]
    for name in TO_PEFT:
        if name in options and name not in ("targets", "exclude", "train_modules"):
            assert getattr(config, name) == options[name]


def cut(theirs, masks):
    """Set E to zero as the masks say and let PEFT's record know, as its allocator does."""
    pattern = {}
    for (name, parameter), mask in zip(
        [(n, p) for n, p in theirs.base_model.model.named_parameters() if "lora_E" in n], masks, strict=True
    ):
        parameter.data.masked_fill_(~torch.tensor(mask)[:, None], 0.0)
        pattern[name] = list(mask)
    theirs.peft_config["default"].rank_pattern = pattern


@pytest.mark.parametrize("nothing", [False, True])
def test_a_file_of_peft_with_ranks_cut(nothing, tmp_path):
    masks = [[True, False, True, False, False], [False] * 5 if nothing else [True] * 5, [False, True] + 3 * [False]]
    masks.append([True, True, False, True, False])
    options = {"targets": ["q_proj", "v_proj"]}
    theirs = to_peft(tiny_llama, options)
    move(trained(theirs))
    cut(theirs, masks)
    expected = output(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    close(output(again), expected)
    model = tiny_llama()
    load(model, tmp_path / "theirs")
    close(output(model), expected)
    ranks = [layer.rank for layer in adalora_layers(model, "default").values()]
    assert ranks == [sum(mask) for mask in masks if any(mask)]
    save(model, tmp_path / "ours")
    assert written(tmp_path / "ours").items() <= written(tmp_path / "theirs").items()
    close(output(peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")), expected)
    close(output(merged(model)), expected)


def merged(model):
    merge(model, keep_base=False)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, 'bias="all" asks for something that is not offered with AdaLoRA'),
        ({"use_dora": None, "layers_to_transform": [1]}, r"layers_to_transform=\[1\] asks for"),
        ({"rank_pattern": {"nowhere.lora_E": [True]}}, 'kept_ranks: "nowhere" is none of the adapted modules'),
        ({"lora_alpha": 0}, "alpha must be a number above 0"),
        ({"total_step": None}, "total_steps must be a whole number"),
    ],
)
def test_a_file_that_asks_for_more_is_refused(changes, message, tmp_path):
    model = tiny_llama()
    attach(model, adalora(targets=["q_proj"]))
    save(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(entries(tmp_path) | changes))
    with pytest.raises(ValueError, match=message):
        load(tiny_llama(), tmp_path)


def test_an_attached_adapter_must_scale_as_the_file_says(tmp_path):
    model = tiny_llama()
    attach(model, adalora(targets=["q_proj"]))
    save(model, tmp_path)
    for options, message in (({"alpha": 8}, "has alpha=7, which scales it, the attached .* has 8"),
                             ({"initial_rank": 6}, "has initial_rank=5, .* has 6")):  # fmt: skip
        other = tiny_llama()
        attach(other, adalora(**({"targets": ["q_proj"]} | options)))
        with pytest.raises(ValueError, match=message):
            load(other, tmp_path)
    load(model, tmp_path)


# --- the budget -----------------------------------------------------------------------------------------------------


def pair(options):
    """One AdaLoRA of PEFT's and one of ours with the same values, and what belongs together in them."""
    theirs = to_peft(tiny_llama, options)
    model = tiny_llama()
    attach(model, adalora(**options))
    mine = adalora_layers(model, "default")
    both = []
    for place, layer in mine.items():
        other = theirs.base_model.model.get_submodule(place)
        for letter in "AEB":
            parameter = getattr(other, f"lora_{letter}")["default"]
            ours = layer.get_parameter(f"lora_{letter.lower()}")
            both.append((ours, parameter))
    return theirs, model, both


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "v_proj", "up_proj"]},
        {"targets": ["q_proj", "up_proj"], "warmup_steps": 2, "final_steps": 3, "interval": 2, "total_steps": 12},
        {"targets": ["k_proj"], "beta1": 0.6, "beta2": 0.95, "target_rank": 1, "final_steps": 1},
    ],
)
def test_the_budget_is_pefts_step_for_step(options):
    theirs, model, both = pair(options)
    budget, generator = RankBudget(), torch.Generator().manual_seed(7)
    total, cuts = options.get("total_steps", 9), 0
    for step in range(1, total + 1):
        with torch.no_grad():
            for ours, other in both:
                drawn = torch.randn(other.shape, generator=generator)
                other.add_(0.1 * drawn)
                ours.copy_(other.view(ours.shape))
                other.grad = torch.randn(other.shape, generator=generator)
                ours.grad = other.grad.view(ours.shape).clone()
        kept = budget.update(model, step)
        theirs.base_model.update_and_allocate(step)
        assert kept == theirs.base_model.rankallocator.budget_schedule(step)[0]
        for ours, other in both:
            assert torch.equal(ours, other.view(ours.shape))
        off = sum(int((ours == 0).sum()) for ours, _ in both)
        cuts += off > 0
        if step >= total - options.get("final_steps", 0):
            assert off == 5 * len(both) // 3 - kept, "as many are off as the target says"
    assert cuts >= 3


def test_the_schedule():
    numbers = [
        kept_triplets(s, initial=50, target=20, total_steps=20, warmup_steps=4, final_steps=6) for s in range(1, 21)
    ]
    assert numbers[:4] == [50] * 4
    assert numbers[4:14] == [int(30 * (1 - (s - 4) / 10) ** 3 + 20) for s in range(5, 15)]
    assert numbers[13:] == [20] * 7
    assert numbers == sorted(numbers, reverse=True)


def test_a_triplet_comes_back_until_the_last_cut_and_not_after():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 7))
    attach(model, adalora(initial_rank=3, target_rank=1, total_steps=6, final_steps=2))
    budget, layer = RankBudget(), model[0]
    optimizer, off = torch.optim.SGD(adapter_parameters(model).values(), lr=0.05), []
    x, y = torch.randn(11, 7), torch.randn(11, 7)
    for step in range(1, 7):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        grown = int((layer.lora_e == 0).sum())
        budget.update(model, step)
        off.append((grown, int((layer.lora_e == 0).sum())))
    assert all(grown == 0 for grown, _ in off), "between steps E goes on being trained"
    assert [after for _, after in off][3:] == [2, 2, 2]


def step_of(model, optimizer, seed):
    optimizer.zero_grad()
    ids = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def test_a_budget_goes_on_from_its_state():
    def run(stop, stays=False):
        torch.manual_seed(0)
        model = tiny_llama()
        attach(model, adalora(targets=["q_proj", "v_proj"], final_steps=2))
        optimizer, budget = torch.optim.SGD(adapter_parameters(model).values(), lr=0.3), RankBudget()
        for step in range(1, 10):
            step_of(model, optimizer, step)
            budget.update(model, step)
            if step == stop:
                state = budget.state_dict()
                for part in state.values():
                    assert all(isinstance(value, torch.Tensor) for value in part.values())
                other = RankBudget()
                other.load_state_dict(state)
                budget = budget if stays else other
                for part in state.values():
                    for value in part.values():
                        value.fill_(1)  # a state is a copy
        return {name: p.clone() for name, p in adapter_parameters(model).items()}

    whole = run(None)
    assert any(bool((p == 0).any()) for p in whole.values())
    for stop, stays in ((3, False), (3, True), (7, False), (7, True), (8, False)):
        resumed = run(stop, stays)
        assert all(torch.equal(whole[name], p) for name, p in resumed.items())
    with pytest.raises(CheckpointError, match="the saved state has no sensitivity"):
        RankBudget().load_state_dict({})


ROWS = [{"input_ids": [5 + i, 7, 11 + i, 13], "labels": [5 + i, 7, 11 + i, 13]} for i in range(8)]


def loop(folder=None, *, options=None, penalties=None, budget=None, **settings):
    torch.manual_seed(0)
    model = tiny_llama()
    attach(model, adalora(**({"targets": ["q_proj", "v_proj"], "total_steps": 6, "final_steps": 2} | (options or {}))))
    settings = LoopSettings(max_steps=6, rows_per_step=2, progress=False, folder=folder, learning_rate=0.01, **settings)
    return TrainingLoop(
        model, ROWS, settings=settings, collate=collate_packed, callbacks=[budget or RankBudget()],
        penalties=[AdaLoRAOrthogonality()] if penalties is None else penalties,
    )  # fmt: skip


class Stops(RankBudget):
    def on_step_end(self, loop, metrics):
        super().on_step_end(loop, metrics)
        if loop.step == 4:
            raise KeyboardInterrupt


Stops.__name__ = "RankBudget"  # a checkpoint tells callbacks by their names


def test_a_loop_killed_and_resumed_is_one_that_was_not(tmp_path):
    whole = loop()
    history = whole.fit()
    assert [row["rank_budget"] for row in history] == [13, 9, 8, 8, 8, 8]
    assert all(row["penalty"] > 0 for row in history)
    killed = loop(tmp_path, save_every=3, budget=Stops())
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    resumed = loop(tmp_path, save_every=3)
    resumed.fit(resume=True)
    ours, others = adapter_parameters(resumed.model), adapter_parameters(whole.model)
    assert all(torch.equal(ours[name], p) for name, p in others.items())
    assert sum(int((p == 0).sum()) for p in others.values()) == 4 * 5 - 8


def test_a_loop_that_does_not_fit_the_record_is_refused():
    with pytest.raises(ValueError, match=r"has total_steps=7, and the loop runs 6: attach it with the loop's number"):
        loop(options={"total_steps": 7}).fit()
    with pytest.raises(ValueError, match=r"has orthogonality=0.5, and the loop has no penalty for it: add AdaLoRAOrth"):
        loop(penalties=[]).fit()
    loop(penalties=[], options={"orthogonality": 0}).fit()


def test_a_step_that_overflowed_is_no_measure():
    made = loop(penalties=[], options={"orthogonality": 0})
    budget = made.callbacks[0]
    for made.step in range(1, 7):
        metrics = {"overflow": 1.0}
        for parameter in adapter_parameters(made.model).values():
            parameter.grad = torch.full_like(parameter, torch.inf)
        if made.step == 4:
            budget.sensitivity = {}
            with pytest.raises(ValueError, match="before any step was taken note of: call update at every step"):
                budget.on_step_end(made, metrics)
            break
        budget.on_step_end(made, metrics)
        assert "rank_budget" not in metrics
        assert not budget.sensitivity


def test_calls_at_the_wrong_time_are_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"]), "lora")
    attach(model, adalora(targets=["v_proj"], final_steps=2))
    budget = RankBudget()
    with pytest.raises(ValueError, match=r"v_proj.lora_a has no gradient: call update after backward and before"):
        budget.update(model, 1)
    with pytest.raises(ValueError, match=r"step must be from 1 to the record's total_steps 9; got 0"):
        budget.update(model, 0)
    with pytest.raises(ValueError, match=r"the last cut, at step 7, was not made: call update at every step"):
        budget.update(model, 8)
    with pytest.raises(ValueError, match=r'adapter "lora" is LoRA: a RankBudget cuts AdaLoRA'):
        RankBudget("lora").update(model, 1)
    with pytest.raises(ValueError, match=r'the model has no adapter "other"'):
        RankBudget("other").update(model, 1)


# --- trimming -------------------------------------------------------------------------------------------------------


def test_trimmed_ranks_give_the_same_output_and_pefts_files(tmp_path):
    model = tiny_llama()
    attach(model, adalora(targets=["q_proj", "v_proj"]))
    move(adapter_parameters(model))
    layers = adalora_layers(model, "default")
    places = list(layers)
    with torch.no_grad():
        layers[places[0]].lora_e[[1, 3]] = 0
        layers[places[1]].lora_e[:] = 0
    expected = output(model)
    save(model, tmp_path / "before")
    assert trim_ranks(model) == dict(zip(places, (3, 1, 5, 5), strict=True))
    close(output(model), expected)
    assert layers[places[0]].lora_b.shape == (56, 3)
    save(model, tmp_path / "ours")
    pattern = entries(tmp_path / "ours")["rank_pattern"]
    assert [sum(mask) for mask in pattern.values()] == [3, 1, 5, 5]
    assert {len(mask) for mask in pattern.values()} == {5}
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    close(output(theirs), expected)
    again = tiny_llama()
    load(again, tmp_path / "ours")
    assert torch.equal(output(again), output(model))
    with pytest.raises(ValueError, match=r"4 mismatched|6 mismatched"):
        load(model, tmp_path / "before")
    for folder in ("before", "ours"):
        whole = tiny_llama()
        load(whole, tmp_path / folder)
        close(output(merged(whole)), expected)


def test_what_cannot_be_trimmed_is_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3), "lora")
    attach(model, adalora(targets=["q_proj"]))
    with pytest.raises(ValueError, match='adapter "default" is at 0 everywhere: train it before'):
        trim_ranks(model)
    with pytest.raises(ValueError, match='adapter "lora" is LoRA: only AdaLoRA has ranks to trim'):
        trim_ranks(model, "lora")
    move(adapter_parameters(model))
    merge(model)
    with pytest.raises(ValueError, match='adapter "default" is merged into the weights: unmerge it first'):
        trim_ranks(model)


# --- the penalty ----------------------------------------------------------------------------------------------------


def test_the_penalty_is_pefts_and_the_formula():
    theirs, model, both = pair({"targets": ["q_proj", "up_proj"]})
    move(trained(theirs))
    with torch.no_grad():
        for ours, other in both:
            ours.copy_(other.view(ours.shape))
    plain = theirs.base_model.model(input_ids=IDS, labels=IDS).loss
    with_penalty = theirs.base_model(input_ids=IDS, labels=IDS).loss
    penalty = AdaLoRAOrthogonality()(model)
    torch.testing.assert_close(with_penalty - plain, penalty, rtol=1e-5, atol=1e-5)
    terms = []
    for layer in adalora_layers(model, "default").values():
        for gram in (layer.lora_a @ layer.lora_a.T, layer.lora_b.T @ layer.lora_b):
            terms.append((gram - torch.eye(5)).square().sum().sqrt())
    torch.testing.assert_close(AdaLoRAOrthogonality(3.0)(model), 3.0 * sum(terms) / len(terms))


def double():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11, dtype=torch.float64), nn.Linear(11, 5, dtype=torch.float64))
    attach(model, adalora(dtype=torch.float64))
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(parameter.ndim == 2)  # E has no part in it
    return model


def test_the_penalty_keeps_the_laws_of_one_without_an_anchor():
    for check in (penalty_leaves_no_trace, penalty_is_the_same_twice, penalty_has_its_gradient):
        check(lambda model: AdaLoRAOrthogonality(), double())
    model = double()
    for layer in adalora_layers(model, "default").values():
        nn.init.orthogonal_(layer.lora_a)
        nn.init.orthogonal_(layer.lora_b)
    value = AdaLoRAOrthogonality()(model)
    value.backward()
    assert value.item() < 1e-12
    assert all(bool(p.grad.isfinite().all()) for p in trained(model).values())


def test_a_penalty_for_nothing_is_refused():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3), "lora")
    attach(model, adalora(targets=["q_proj"], orthogonality=0))
    with pytest.raises(ValueError, match=r"has orthogonality=0: leave the penalty out, or give it a strength"):
        AdaLoRAOrthogonality()(model)
    assert AdaLoRAOrthogonality(2.0)(model).item() > 0
    with pytest.raises(ValueError, match=r"adapter \"lora\" is LoRA: this penalty is AdaLoRA's"):
        AdaLoRAOrthogonality(name="lora")(model)
    with pytest.raises(ValueError, match="strength must be a number above 0"):
        AdaLoRAOrthogonality(-1.0)


# --- records --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0}, ValueError, "alpha must be a number above 0"),
        ({"total_steps": 0}, ValueError, "total_steps must be a whole number of at least 1"),
        ({"initial_rank": 1.5}, ValueError, "initial_rank must be a whole number"),
        ({"target_rank": 6}, ValueError, "target_rank 6 is larger than initial_rank 5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be a whole number of steps, 0 or more; got -1"),
        (
            {"warmup_steps": 4, "final_steps": 5},
            ValueError,
            "4 warmup_steps and 5 final_steps leave none of the 9 total_steps to cut ranks in",
        ),
        ({"interval": 0}, ValueError, "interval must be a whole number"),
        ({"beta1": 1.0}, ValueError, "beta1 must be a probability"),
        ({"beta2": 0}, ValueError, "beta2 must be a number above 0"),
        ({"orthogonality": -0.5}, ValueError, "orthogonality must be a number above 0"),
        ({"dropout": 1}, ValueError, "dropout must be a probability"),
        ({"kept_ranks": {"x": 0}}, ValueError, r"kept_ranks\['x'\] must be a whole number"),
        ({"targets": ()}, ValueError, "targets names no module"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating torch dtype"),
    ],
)
def test_a_record_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        adalora(**options)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (tiny_llama, {"targets": ["embed_tokens"]}, TypeError, "is a Embedding: AdaLoRA goes to linear"),
        (tiny_llama, {"initial_rank": 29}, ValueError, "the rank 29 is larger than .* allows: .* is 28"),
        (tiny_llama, {"kept_ranks": {"model.layers.0.mlp": 2}}, ValueError, 'kept_ranks: "model.layers.0.mlp" is none'),
        (
            tiny_llama,
            {"kept_ranks": {"model.layers.0.mlp.up_proj": 6}},
            ValueError,
            "kept_ranks has 6 for model.layers.0.mlp.up_proj, more than the initial_rank 5",
        ),
        (lambda: nn.ModuleDict({"a": nn.MultiheadAttention(12, 2)}), {}, TypeError, "belongs to nn.MultiheadAttention"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_on_a_model_is_refused(make, options, error, message):
    model = make()
    with pytest.raises(error, match=message):
        attach(model, adalora(**options))
    assert not hasattr(model, "_llmtune_adapters")


def test_conv1d_and_meta():
    model = tiny_gpt2()
    attach(model, adalora())
    assert isinstance(model.transformer.h[0].attn.c_attn, AdaLoRAConv1D)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(7, 11))
    attach(model, adalora())
    assert model[0].lora_e.is_meta
