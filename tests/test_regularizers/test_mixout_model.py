"""Mixout over a whole model: what is mixed, what is left, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from traces import LOSSES, MODELS, assert_same, batch_of, equal, logits_of, traces, trained

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.regularizers.mixout import mixout
from llmtune.regularizers.mixout_model import mixout_model
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.testing.small import SmallModel, moved


def two_layers():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.mark.parametrize("name", MODELS)
def test_the_model_that_comes_back_is_the_one_that_went_in(name):
    model = MODELS[name]().train()
    plain, before = logits_of(name, model), traces(model)
    with mixout_model(model, 0.5) as mixed:
        assert list(model.state_dict()) == list(before[1])
        assert torch.equal(logits_of(name, model), plain)  # untrained: target and weight are one
        moved(model, scale=0.01)
        assert not torch.equal(logits_of(name, model), logits_of(name, model))
        assert torch.equal(logits_of(name, model.eval()), logits_of(name, model))
        model.train()
        assert all(torch.equal(target, before[1][key][1]) for key, target in mixed.items())
        model.load_state_dict({key: value for key, (_, value, _) in before[1].items()})
    assert_same(before, traces(model))
    assert torch.equal(logits_of(name, model), plain)


def test_which_weights_are_mixed():
    with mixout_model(tiny_llama(), 0.5) as mixed:
        assert len(mixed) == 2 * 7  # q, k, v, o, gate, up, down; not the head, the embedding, the norms
    with mixout_model(tiny_gpt2(), 0.5) as mixed:
        assert len(mixed) == 2 * 4
    with mixout_model(tiny_bert(labels=3), 0.5, exclude=["pooler.dense"]) as mixed:
        assert len(mixed) == 2 * 6
    with mixout_model(tiny_llama(), 0.5, targets=r".*0\.mlp\..*_proj") as mixed:
        assert sorted(key.split(".")[-2] for key in mixed) == ["down_proj", "gate_proj", "up_proj"]


def test_output_and_gradient_are_those_of_the_mixed_weights():
    model, x = two_layers(), torch.randn(11, 5, dtype=torch.float64)
    with mixout_model(model, 0.4) as mixed:
        moved(model, scale=1.0)
        torch.manual_seed(5)
        found = model(x)
        gradients = torch.autograd.grad(found.square().sum(), [model[0].weight, model[2].weight])
    torch.manual_seed(5)
    weights, masks = [], []
    for place in (0, 2):
        weight, target = model[place].weight.detach(), mixed[f"{place}.weight"]
        kept = torch.empty(weight.shape, dtype=torch.bool).bernoulli_(0.6)
        masks.append(kept)
        weights.append(((kept * weight + ~kept * target - 0.4 * target) / 0.6).requires_grad_())
    hidden = torch.tanh(x @ weights[0].T + model[0].bias)
    expected = hidden @ weights[1].T + model[2].bias
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    plain = torch.autograd.grad(expected.square().sum(), weights)
    for gradient, by_mixed, kept in zip(gradients, plain, masks, strict=True):
        torch.testing.assert_close(gradient, by_mixed * kept / 0.6, rtol=1e-12, atol=1e-12)


def test_a_tied_weight_is_drawn_once_in_a_forward_pass():
    model, x = SmallModel().train(), torch.randn(11, 5, dtype=torch.float64)
    with mixout_model(model, 0.4, targets=["first", "second"], replace_dropout=True) as mixed:
        moved(model, scale=1.0)
        torch.manual_seed(5)
        found = model(x)
        assert not torch.equal(model(x), found)  # anew in the next
        with pytest.raises(ValueError, match=r"weight is tied, and mixed once .* called outside of one"):
            model.first(x)
    torch.manual_seed(5)
    weight = mixout(model.first.weight, mixed["first.weight"], 0.4)
    hidden = torch.tanh(x @ weight.T + model.first.bias) @ weight.T + model.second.bias
    torch.testing.assert_close(found, model.head(model.norm(hidden * model.scale)), rtol=1e-12, atol=1e-12)


def test_a_forward_pass_that_raises_ends_it_too():
    model = SmallModel().train()
    with mixout_model(model, 0.4, targets=["first", "second"]):
        with pytest.raises(RuntimeError):
            model(torch.randn(11, 7, dtype=torch.float64))
        with pytest.raises(ValueError, match="outside of one"):
            model.first(torch.randn(11, 5, dtype=torch.float64))


def test_recomputation_draws_the_same():
    model, x = two_layers(), torch.randn(11, 5, dtype=torch.float64)
    found = []
    with mixout_model(model, 0.4):
        moved(model, scale=1.0)
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
            model.zero_grad()
            torch.manual_seed(5)
            run(x).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
def test_dropout_is_replaced_and_comes_back(name):
    model = MODELS[name](dropout=0.3)
    plain, before = logits_of(name, model), traces(model.train())
    with mixout_model(model, 0.0, replace_dropout=True):
        assert torch.equal(logits_of(name, model), plain)
    assert_same(before, traces(model))
    assert not torch.equal(logits_of(name, model), logits_of(name, model))


def test_pretrained_weights_may_be_given():
    model = tiny_gpt2()
    pretrained = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    with mixout_model(model, 0.5, pretrained=pretrained) as mixed:
        assert all(not target.any() for target in mixed.values())
        pretrained["transformer.h.0.attn.c_attn.weight"] += 1.0  # kept as a copy
        assert all(not target.any() for target in mixed.values())


def test_a_model_that_moves_takes_its_targets_along():
    model = two_layers()
    with mixout_model(model, 0.5) as mixed:
        model.float()
        assert model(torch.randn(2, 5)).dtype == torch.float32
        assert all(target.dtype == torch.float32 for target in mixed.values())


def test_under_lora_only_trained_base_weights_are_mixed():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=4))
    before = traces(model)
    with pytest.raises(
        ValueError, match=r"nothing to mix, no weight of \"all-linear\" requires a gradient. Under adap"
    ):
        mixout_model(model, 0.5).__enter__()
    assert_same(before, traces(model))
    model.model.layers[1].mlp.down_proj.base.weight.requires_grad_(True)
    with mixout_model(model.train(), 0.5) as mixed:
        assert list(mixed) == ["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(logits_of("llama", model), logits_of("llama", model))
        moved(model)
        assert not torch.equal(logits_of("llama", model), logits_of("llama", model))


def test_a_compiled_model_mixes_inside_the_block_only():
    model, x = two_layers(), torch.randn(11, 5, dtype=torch.float64)
    run = torch.compile(model, backend="aot_eager")
    moved(model, scale=1.0)
    start = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    plain = run(x)
    with mixout_model(model, 0.4, pretrained=start):
        assert not torch.equal(run(x), run(x))
        run(x).sum().backward()
    assert torch.equal(run(x), plain)


def test_a_copy_made_inside_is_of_its_own():
    model, x = two_layers(), torch.randn(11, 5, dtype=torch.float64)
    with mixout_model(model, 0.4):
        other = copy.deepcopy(model)
        moved(other, scale=1.0)
        assert torch.equal(model(x), model(x))
        assert not torch.equal(other(x), other(x))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_two_runs_of_one_seed_are_equal_and_so_is_a_resumed_one(name, tmp_path):
    context = partial(mixout_model, p=0.5)
    whole = trained(MODELS[name](), context)
    assert not equal(whole, trained(MODELS[name](), partial(mixout_model, p=0.0)))
    assert equal(whole, trained(MODELS[name](), context))
    trained(MODELS[name](), context, folder=tmp_path / "run", stop=2)
    assert equal(whole, trained(MODELS[name](), context, folder=tmp_path / "run", resume=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_loss_trains_under_it(name):
    model = MODELS[name]().train()
    with mixout_model(model, 0.5) as mixed:
        LOSSES[name](model, batch_of(name)).backward()
        assert all(model.get_parameter(key).grad.abs().sum() > 0 for key in mixed)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_one_block_at_a_time(make):
    model = make()
    with mixout_model(model, 0.5), pytest.raises(ValueError, match="mixout_model is on this model already: one block"):
        mixout_model(model, 0.5).__enter__()
    with mixout_model(model, 0.5):
        pass


def test_after_an_exception_nothing_is_left():
    model = tiny_bert(dropout=0.3)
    before = traces(model)
    with pytest.raises(KeyError), mixout_model(model, 0.5, replace_dropout=True):
        raise KeyError
    assert_same(before, traces(model))


def own_forward():
    model = two_layers()
    model[0].forward = model[0].forward
    return model


@pytest.mark.parametrize(
    ("make", "knobs", "error", "message"),
    [
        (tiny_llama, {"p": 1.0}, ValueError, "p must be a probability from 0 to below 1; got 1.0"),
        (tiny_llama, {"targets": ["q_prj"]}, ValueError, r'targets: "q_prj" matches no .* Did you mean "q_proj"'),
        (tiny_llama, {"exclude": ["q_prj"]}, ValueError, r'exclude: "q_prj" matches no'),
        (
            tiny_llama,
            {"targets": ["mlp"]},
            TypeError,
            "mlp is a LlamaMLP without a weight: mixout goes to linear layers",
        ),
        (tiny_llama, {"targets": ["norm"]}, TypeError, "norm is a LlamaRMSNorm: mixout goes to plain linear layers"),
        (tiny_llama, {"targets": ["lm_head"]}, TypeError, "lm_head is the output head, whose weight losses read"),
        (tiny_llama, {"replace_dropout": True}, ValueError, "LlamaForCausalLM has no dropout above 0 to replace"),
        (tiny_llama, {"pretrained": {}}, ValueError, r'pretrained has no "model.layers.0.self_attn.q_proj.weight"'),
        (two_layers, {"pretrained": {"0.weight": torch.ones(5, 7)}}, ValueError, r"must be \[7, 5\]; got \[5, 7\]"),
        (SmallModel, {"targets": ["first"]}, ValueError, "the weight of first is tied to second, which is not mixed"),
        (own_forward, {}, TypeError, "0 is a Linear: mixout goes to plain linear layers"),
    ],
)
def test_what_is_refused(make, knobs, error, message):
    model = make()
    with pytest.raises(error, match=message):
        mixout_model(model, **({"p": 0.5} | knobs)).__enter__()
