"""Combining adapters: against dense float64 sums, in any layout, saved and read by PEFT, refused with a sentence."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    DoRA,
    LoRA,
    active,
    adapter_names,
    adapter_parameters,
    attach,
    combine,
    detach,
    load,
    merge,
    save,
    set_active,
    unmerge,
)
from llmtune.adapters.layer import adapter_chain, named_places
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.weights import merge_deltas, trim

IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
lora = partial(LoRA, rank=3, alpha=5)
PAIRS = {  # two adapters that differ in targets, ranks, scaling and patterns
    "llama": (tiny_llama, lora(targets=["q_proj", "up_proj"]), LoRA(rank=5, alpha=2, targets=["q_proj", "v_proj"])),
    "llama, rslora": (tiny_llama, lora(rslora=True), LoRA(rank=2, alpha=7, targets=["o_proj"])),
    "llama, patterns": (
        tiny_llama,
        lora(rank_pattern={"q_proj": 4, r"layers\.1\.mlp\.up_proj": 7}, alpha_pattern={"v_proj": 11}),
        lora(targets=r".*layers\.1\..*(gate|up)_proj"),
    ),
    "llama, embeddings": (tiny_llama, lora(targets=["embed_tokens", "q_proj"]), lora(targets=["embed_tokens"])),
    "gpt2, Conv1D": (tiny_gpt2, lora(targets=["c_attn", "wpe"]), LoRA(rank=2, alpha=3, targets=["c_attn", "c_fc"])),
    "bert, lora bias": (
        tiny_bert,
        lora(targets=["query", "value"], lora_bias=True),
        LoRA(rank=2, alpha=3, targets=["query", "key"]),
    ),
    "bert, own biases": (
        tiny_bert,
        lora(targets=["query", "value"], train_bias="lora_only"),
        LoRA(rank=2, alpha=3, targets=["query", "key"], lora_bias=True),
    ),
    "gpt2, all biases": (tiny_gpt2, lora(targets=["c_attn"], train_bias="all"), lora(targets=["c_fc"])),
    "t5": (tiny_t5, lora(targets=["q", "wo"]), LoRA(rank=2, alpha=9, targets=["q", "v"])),
}
WEIGHTS = [0.7, -1.3]


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def move(model, name, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter_parameters(model, name).items()):
            parameter.add_((0.2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def two(make, one, other):
    model = make()
    for seed, (name, config) in enumerate({"one": one, "other": other}.items()):
        attach(model, config, name)
        move(model, name, seed)
    return model


def deltas(model, name):
    """Every change of a parameter by an adapter, in float64, summed over its layers there."""
    found = {}
    for place, module in named_places(model):
        for layer in adapter_chain(module):
            if layer.adapter_name == name:
                low = layer.low_rank()
                for local, delta in layer.deltas().items():
                    exact = delta.detach().double()
                    if local == "weight" and low is not None:
                        exact = low[2] * low[0].detach().double() @ low[1].detach().double()
                    key = f"{place}.{local}"
                    found[key] = found.get(key, 0) + exact
    return found


def same(found, expected, tolerance=1e-6):
    for key in found.keys() | expected.keys():
        one = found.get(key, torch.zeros(()).double())
        other = expected.get(key, torch.zeros(()).double())
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) <= tolerance * scale + 1e-9, key


def weighted(*parts):
    total = {}
    for weight, changes in parts:
        for key, delta in changes.items():
            total[key] = total.get(key, 0) + weight * delta
    return total


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_the_exact_methods_are_the_weighted_sum(pair, method):
    model = two(*pair)
    wanted = weighted((0.7, deltas(model, "one")), (-1.3, deltas(model, "other")))
    report = combine(model, ["one", "other"], WEIGHTS, new_name="both", method=method)
    same(deltas(model, "both"), wanted)
    assert report.largest_error == 0.0
    for place, rank in report.ranks.items():
        ranks = [
            layer.rank
            for layer in adapter_chain(dict(named_places(model))[place])
            if layer.adapter_name != "both" and hasattr(layer, "rank")
        ]
        assert rank == sum(ranks)


def test_the_output_is_that_of_both_where_the_weights_are_one(pair):
    model = two(*pair)
    expected = output(model)
    combine(model, ["one", "other"], [1, 1], new_name="both")
    with active(model, "both"):
        torch.testing.assert_close(output(model), expected, rtol=2e-5, atol=2e-5)
    detach(model, "one")
    detach(model, "other")
    set_active(model, "both")
    torch.testing.assert_close(output(model), expected, rtol=2e-5, atol=2e-5)


def test_ours_mixes_no_factors_and_peft_does():
    """What PEFT's "linear" holds beside the sum is B_i A_j."""
    peft = pytest.importorskip("peft")
    configs = [peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], init_lora_weights=False) for _ in range(2)]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(tiny_llama(), configs[0], "one")
    theirs.add_adapter("other", configs[1])
    theirs.add_weighted_adapter(["one", "other"], [0.7, 1.3], "both", combination_type="linear")
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    wanted = 0.7 * layer.get_delta_weight("one") + 1.3 * layer.get_delta_weight("other")
    error = (layer.get_delta_weight("both") - wanted).norm() / wanted.norm()
    assert error > 0.5
    model = two(tiny_llama, lora(targets=["q_proj"]), lora(targets=["q_proj"]))
    mine = model.model.layers[0].self_attn.q_proj  # "other" is outermost, "one" is its base
    for name, own in (("one", mine.base), ("other", mine)):
        own.lora_a.data.copy_(layer.lora_A[name].weight)
        own.lora_b.data.copy_(layer.lora_B[name].weight)
    combine(model, ["one", "other"], [0.7, 1.3], new_name="both", method="linear")
    found = model.model.layers[0].self_attn.q_proj.deltas()["weight"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "theirs", "options", "weights"),
    [
        ("cat", "cat", {}, WEIGHTS),
        ("svd", "svd", {"rank": 4}, WEIGHTS),
        ("magnitude_prune", "magnitude_prune_svd", {"rank": 4, "density": 0.3}, WEIGHTS),
        ("ties", "ties_svd", {"rank": 4, "density": 0.3}, [1.0, 1.0]),  # with other weights they vote unweighed
    ],
)
def test_peft_agrees_where_it_works_on_the_changes(method, theirs, options, weights, tmp_path):
    peft = pytest.importorskip("peft")
    model = two(*PAIRS["llama"])
    for name in ("one", "other"):
        save(model, tmp_path, name)
    oracle = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "one", adapter_name="one")
    oracle.load_adapter(tmp_path / "other", "other")
    given = {{"rank": "svd_rank"}.get(name, name): value for name, value in options.items()}
    oracle.add_weighted_adapter(["one", "other"], weights, "both", combination_type=theirs, **given)
    combine(model, ["one", "other"], weights, new_name="both", method=method, **options)
    for key, delta in deltas(model, "both").items():
        layer = oracle.base_model.model.get_submodule(key.removesuffix(".weight"))
        torch.testing.assert_close(delta.float(), layer.get_delta_weight("both"), rtol=1e-4, atol=1e-5)


def test_combining_changes_nothing_that_is_there(pair):
    model = two(*pair)
    before, start = {name: t.clone() for name, t in model.state_dict().items()}, output(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    combine(model, ["one", "other"], WEIGHTS, new_name="both")
    assert torch.equal(output(model), start)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in adapter_parameters(model, "both").values())
    assert all(p.requires_grad for p in adapter_parameters(model, "other").values())
    copied = copy.deepcopy(model)
    detach(model, "both")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert adapter_names(copied) == ["one", "other", "both"]


@pytest.mark.parametrize("rank", [None, 1, 2, 4, 50])
def test_svd_is_the_nearest_of_its_rank_and_says_how_far(rank):
    model = two(*PAIRS["llama, embeddings"])
    whole = weighted((0.7, deltas(model, "one")), (-1.3, deltas(model, "other")))
    report = combine(model, ["one", "other"], WEIGHTS, new_name="both", method="svd", rank=rank)
    found = deltas(model, "both")
    for place, error in report.errors.items():
        wanted = whole[f"{place}.weight"]
        needed = 6 if "embed" in place else 3  # both adapters go to the embedding
        assert report.ranks[place] == min(rank or 3, needed)
        u, values, v = torch.linalg.svd(wanted, full_matrices=False)
        r = report.ranks[place]
        nearest = (u[:, :r] * values[:r]) @ v[:r]
        torch.testing.assert_close(found[f"{place}.weight"], nearest, rtol=1e-5, atol=1e-6)
        measured = (found[f"{place}.weight"] - wanted).norm() / wanted.norm()
        assert error == pytest.approx(float(measured), abs=1e-6)
    assert report.largest_error == max(report.errors.values())
    assert (report.largest_error > 0.01) == (rank != 50)


@pytest.mark.parametrize("method", ["ties", "dare", "magnitude_prune"])
@pytest.mark.parametrize("name", ["llama", "gpt2, Conv1D", "llama, embeddings", "bert, lora bias", "gpt2, all biases"])
def test_the_dense_methods_work_on_the_changes_themselves(method, name):
    model = two(*PAIRS[name])
    parts = [deltas(model, "one"), deltas(model, "other")]
    options = {"generator": torch.Generator().manual_seed(5)} if method == "dare" else {}
    combine(model, ["one", "other"], WEIGHTS, new_name="both", method=method, density=0.6, rank=99, **options)
    found, draws = deltas(model, "both"), torch.Generator().manual_seed(5)
    for key in dict.fromkeys([*found, *parts[0], *parts[1]]):
        here = [(w, part[key].float()) for w, part in zip(WEIGHTS, parts, strict=True) if key in part]
        if not here:
            assert not found[key].any()
            continue
        weights = [w for w, _ in here]
        if method == "magnitude_prune":
            wanted = sum(w * trim(delta, 0.6) for w, delta in here)
        else:
            own = {"generator": draws} if method == "dare" else {}
            changes = [{"": delta} for _, delta in here]
            wanted = merge_deltas(changes, weights, method=method, density=0.6, **own)[""]
        torch.testing.assert_close(found[key].float(), wanted, rtol=1e-4, atol=1e-5)


def test_a_dense_method_at_a_low_rank_says_what_was_lost():
    model = two(*PAIRS["llama"])
    parts = [deltas(model, "one"), deltas(model, "other")]
    report = combine(model, ["one", "other"], WEIGHTS, new_name="both", method="ties", density=0.3)
    key = "model.layers.0.self_attn.q_proj"
    changes = [{"": part[f"{key}.weight"].float()} for part in parts]
    wanted = merge_deltas(changes, WEIGHTS, method="ties", density=0.3)[""].double()
    measured = float((deltas(model, "both")[f"{key}.weight"] - wanted).norm() / wanted.norm())
    assert report.errors[key] == pytest.approx(measured, abs=1e-6)
    assert measured > 0.1
    assert report.ranks[key] == 5


def test_ranks_beyond_the_smaller_side_are_still_exact():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    for name in ("one", "other", "third"):
        attach(model, LoRA(rank=2, alpha=3), name)
        move(model, name, len(name))
    wanted = weighted(*((w, deltas(model, n)) for n, w in (("one", 1), ("other", -2), ("third", 0.5))))
    report = combine(model, ["one", "other", "third"], [1, -2, 0.5], new_name="all")
    assert report.ranks == {"0": 5, "2": 3}
    same(deltas(model, "all"), wanted)


def test_linear_needs_no_more_ranks_than_the_sum_has():
    model = two(tiny_llama, lora(targets=["q_proj"]), lora(targets=["q_proj"]))
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj):
        layer.lora_a.data.copy_(layer.base.lora_a)
    wanted = weighted((1.0, deltas(model, "one")), (0.5, deltas(model, "other")))
    report = combine(model, ["one", "other"], [1.0, 0.5], new_name="both", method="linear")
    assert set(report.ranks.values()) == {3}
    same(deltas(model, "both"), wanted)
    combine(model, ["one", "both"], [0.0, 0.0], new_name="nothing", method="linear")
    same(deltas(model, "nothing"), {})


def test_one_adapter_may_be_negated_or_compressed():
    model = two(*PAIRS["llama"])
    combine(model, ["other"], [-1], new_name="without")
    same(deltas(model, "without"), weighted((-1, deltas(model, "other"))))
    with active(model, ()):
        base = output(model)
    with active(model, ["other", "without"]):
        torch.testing.assert_close(output(model), base, rtol=1e-5, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_it_is_saved_and_loaded_and_peft_reads_it(pair, method, tmp_path):
    model = two(*pair)
    combine(model, ["one", "other"], WEIGHTS, new_name="both", method=method)
    set_active(model, "both")
    folder = save(model, tmp_path, "both")
    again = pair[0]()
    report = load(again, folder, "both")
    assert not report.unmatched
    assert torch.equal(output(again), output(model))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(pair[0](), folder, autocast_adapter_dtype=False)
    expected = output(model)
    assert float((output(theirs) - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    back = pair[0]()
    load(back, tmp_path / "theirs")
    assert torch.equal(output(back), output(again))


def test_names_that_are_ends_of_others_stay_apart(tmp_path):
    """The modules "0" and "1.0": a suffix "0", and a rank pattern "0", would mean both."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5)))

    model = make()
    attach(model, LoRA(rank=2, alpha=3, targets=r"0"), "one")
    attach(model, LoRA(rank=1, alpha=3, targets=r"0|1\.1"), "other")
    move(model, "one"), move(model, "other")
    report = combine(model, ["one", "other"], [1, 1], new_name="both")
    assert report.ranks == {"0": 3, "1.1": 1}
    x = torch.randn(3, 5)
    expected = model(x)
    again = make()
    load(again, save(model, tmp_path, "both"), "both")
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    attach(model, LoRA(rank=4, alpha=3, targets=r"1\.0"), "third")
    move(model, "third")
    report = combine(model, ["one", "other", "third"], [1, 1, 1], new_name="all")
    assert report.ranks == {"0": 3, "1.0": 4, "1.1": 1}
    expected = model(x)
    set_active(model, "all")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(make(), save(model, tmp_path, "all"))
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)


# --- other dtypes, kinds and states ---------------------------------------------------------------------------------


def test_bf16_adapters_give_a_bf16_adapter():
    model = tiny_llama().to(torch.bfloat16)
    for name in ("one", "other"):
        attach(model, LoRA(rank=2, alpha=3, targets=["q_proj"], dtype=torch.bfloat16), name)
        move(model, name, len(name))
    combine(model, ["one", "other"], WEIGHTS, new_name="both")
    assert {p.dtype for p in adapter_parameters(model, "both").values()} == {torch.bfloat16}
    same(deltas(model, "both"), weighted((0.7, deltas(model, "one")), (-1.3, deltas(model, "other"))), 1e-2)


def test_dora_is_of_full_rank_and_goes_through_its_matrix():
    model = tiny_llama()
    attach(model, DoRA(rank=2, alpha=3, targets=["q_proj"]), "one")
    attach(model, LoRA(rank=3, alpha=5, targets=["q_proj", "v_proj"]), "other")
    move(model, "one", 1), move(model, "other", 2)
    for method in ("cat", "linear"):
        with pytest.raises(ValueError, match=r'adapter "one" changes .*q_proj by a matrix of full rank \(DoRALinear\)'):
            combine(model, ["one", "other"], WEIGHTS, new_name="both", method=method)
    assert adapter_names(model) == ["one", "other"]
    wanted = weighted((0.7, deltas(model, "one")), (-1.3, deltas(model, "other")))
    report = combine(model, ["one", "other"], WEIGHTS, new_name="both", method="svd", rank=28)
    assert report.largest_error < 1e-6
    same(deltas(model, "both"), wanted, 1e-5)
    low = combine(model, ["one", "other"], WEIGHTS, new_name="low", method="svd")
    key = "model.layers.0.self_attn.q_proj"
    assert low.ranks[key] == 3
    measured = (deltas(model, "low")[f"{key}.weight"] - wanted[f"{key}.weight"]).norm() / wanted[f"{key}.weight"].norm()
    assert low.errors[key] == pytest.approx(float(measured), abs=1e-5)


def test_merged_adapters_still_have_their_factors():
    model = two(*PAIRS["llama"])
    wanted = weighted((0.7, deltas(model, "one")), (-1.3, deltas(model, "other")))
    merge(model, "one")
    combine(model, ["one", "other"], WEIGHTS, new_name="both")
    same(deltas(model, "both"), wanted)
    unmerge(model, "one")
    biases = two(*PAIRS["bert, own biases"])
    merge(biases, "one")
    with pytest.raises(ValueError, match='adapter "one" is merged, its trained biases as well: unmerge it first'):
        combine(biases, ["one", "other"], WEIGHTS, new_name="both")


def test_it_can_be_trained_on():
    model = two(*PAIRS["llama"])
    combine(model, ["one", "other"], WEIGHTS, new_name="both")
    set_active(model, "both")
    parameters = adapter_parameters(model, "both")
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    assert all(p.grad is None for p in adapter_parameters(model, "one").values())


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        ([], [], {}, "expected adapters and a weight for each; got 0 names and 0 weights"),
        (["one", "other"], [1], {}, "expected adapters and a weight for each; got 2 names and 1 weights"),
        (["one"], [float("inf")], {}, r"weights must be finite numbers; got \[inf\]"),
        (["one", "othr"], [1, 1], {}, r'has no adapter "othr".*Did you mean "other"\?'),
        (["one", "one"], [1, 1], {}, 'adapter "one" is named twice: name it once, with the sum of its weights'),
        (["one"], [1], {"new_name": "other"}, 'already has an adapter "other": detach it first, or choose another new'),
        (["one"], [1], {"new_name": "q_proj"}, 'the adapter\'s name "q_proj" is also the name of a module'),
        (["one"], [1], {"method": "tis"}, r'method must be one of "cat".*Did you mean "ties"\?'),
        (["one"], [1], {"rank": 2}, '"cat" is exact and takes no rank: use method="svd"'),
        (["one"], [1], {"method": "svd", "rank": 0}, "rank must be a whole number of at least 1; got 0"),
        (["one"], [1], {"density": 0.5}, '"cat" keeps every entry: density=0.5 is for ties, dare, magnitude_prune'),
        (["one"], [1], {"method": "ties"}, '"ties" needs density, the share of entries to keep'),
        (["one"], [1], {"method": "ties", "density": 2}, "density is the share of entries to keep"),
        (["one"], [1], {"generator": torch.Generator()}, '"cat" draws nothing: a generator is for "dare"'),
    ],
)
def test_refusals_change_nothing(names, weights, options, message):
    model = two(*PAIRS["llama"])
    before = {name: (t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=message):
        combine(model, names, weights, **{"new_name": "both"} | options)
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) and after[n].requires_grad == flag for n, (t, flag) in before.items())


def test_copies_of_whole_modules_cannot_stand_twice():
    model = tiny_bert(labels=3)
    attach(model, lora(targets=["query"], train_modules=["classifier"]), "one")
    with pytest.raises(ValueError, match='adapter "one" trains a copy of classifier, and a module can run one copy'):
        combine(model, ["one"], [1], new_name="both")


def test_an_embedding_has_no_bias():
    model = two(tiny_bert, lora(targets=["word_embeddings"]), lora(targets=["query"], lora_bias=True))
    with pytest.raises(ValueError, match=r"another goes to bert\.embeddings\.word_embeddings, an embedding, where a"):
        combine(model, ["one", "other"], WEIGHTS, new_name="both")


def test_what_is_not_finite_or_not_there_is_refused():
    model = two(*PAIRS["llama"])
    next(iter(adapter_parameters(model, "other").values())).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r'adapter "other" has entries that are not finite at model\.layers'):
        combine(model, ["one", "other"], WEIGHTS, new_name="both")
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(5, 3))
    attach(empty, LoRA(rank=2, alpha=3), "one")
    with pytest.raises(ValueError, match='adapter "one" lies on the meta device at 0: load it first'):
        combine(empty, ["one"], [1], new_name="both")
    biases = tiny_bert()
    attach(biases, lora(targets=(), train_modules=["cls"]), "one")
    with pytest.raises(ValueError, match="trains a copy of cls"):
        combine(biases, ["one"], [1], new_name="both")


def test_the_report_says_how_it_was_made():
    model = two(*PAIRS["llama"])
    said = str(combine(model, ["one", "other"], WEIGHTS, new_name="both", method="svd", rank=2)).split("\n")
    assert said[0] == 'adapter "both": 0.7 * "one" + -1.3 * "other" (svd)'
    assert said[1].startswith("6 modules, rank 2, relative error at most 0.")
    assert said[1].endswith('off until set_active(model, "both")')
