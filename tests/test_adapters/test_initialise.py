"""How A and B start: closed forms, the base left alone, PEFT's own starts as oracle, files of twice the rank."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import DoRA, LoRA, LoRAConv1D, LoRAEmbedding, LoRALinear, adapter_parameters, attach, load, save
from llmtune.adapters.initialise import drawn_start, weight_start
from llmtune.errors import LawBroken
from llmtune.testing.adapters import check_adapter
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
IDS = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(0))
FROM_WEIGHT = ("pissa", "pissa_niter_4", "olora")


def output(model):
    inputs = {"labels": IDS} if model.config.model_type == "t5" else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


def test_pissa_takes_the_largest_singular_values():
    torch.manual_seed(0)
    weight = torch.randn(13, 11, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    best = u[:, :3] @ torch.diag(s[:3]) @ vt[:3]
    a, b = weight_start(weight, 3, 1.7, "pissa")
    torch.testing.assert_close(1.7 * b @ a, best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-12, atol=1e-12)
    apart = u @ torch.diag(s / torch.arange(1, 12).square()) @ vt  # iterating needs gaps between the values
    a, b = weight_start(apart, 3, 1.7, "pissa_niter_40")
    torch.testing.assert_close(1.7 * b @ a, u[:, :3] @ torch.diag(s[:3] / torch.tensor([1, 4, 9])) @ vt[:3])


def test_olora_takes_the_first_columns_of_a_qr():
    torch.manual_seed(0)
    weight = torch.randn(13, 11, dtype=torch.float64)
    a, b = weight_start(weight, 3, 1.7, "olora")
    torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(b.T @ weight, a, rtol=1e-10, atol=1e-12)


def test_orthogonal_halves_see_nothing_of_each_other():
    a, b = torch.empty(4, 11), torch.empty(13, 4)
    drawn_start(a, b, "orthogonal")
    assert float((b @ a).abs().max()) < 1e-6 * float(b.norm() * a.norm())
    assert min(float(a.norm()), float(b.norm())) > 0.1
    with pytest.raises(ValueError, match=r'initialise="orthogonal" .* needs an even one; got 3'):
        drawn_start(torch.empty(3, 11), torch.empty(13, 3), "orthogonal")


@pytest.mark.parametrize("name", [*FROM_WEIGHT, "orthogonal"])
def test_every_law_holds_but_an_exact_start(name):
    check_adapter(partial(LoRALinear, rank=4, alpha=6, initialise=name), exempt=["start to the digit"])


def test_a_start_that_is_not_taken_off_is_no_matter_of_rounding():
    class KeepsItsStart(LoRALinear):
        def factors(self):
            return self.lora_a, self.lora_b

    with pytest.raises(LawBroken, match="unseen at the start"):
        check_adapter(partial(KeepsItsStart, rank=3, alpha=6, initialise="pissa"), exempt=["start to the digit"])


@pytest.mark.parametrize("name", FROM_WEIGHT)
def test_it_trains_as_the_paper_does_over_the_rest(name):
    """The same outputs and gradients as B A over a base from which the start has been taken."""
    torch.manual_seed(0)
    base = nn.Linear(11, 13, dtype=torch.float64)
    layer = LoRALinear(copy.deepcopy(base), rank=3, alpha=5, initialise=name, dtype=torch.float64)
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b))
    rest = base.weight.detach() - 5 / 3 * b.detach() @ a.detach()
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.05), torch.optim.SGD([a, b], lr=0.05)]
    layer.base.requires_grad_(False)
    x = torch.randn(7, 11, dtype=torch.float64)
    for _ in range(3):
        papers = x @ rest.T + base.bias.detach() + 5 / 3 * x @ a.T @ b.T
        torch.testing.assert_close(layer(x), papers, rtol=1e-10, atol=1e-10)
        layer(x).square().sum().backward()
        papers.square().sum().backward()
        torch.testing.assert_close(layer.lora_a.grad, a.grad, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(layer.lora_b.grad, b.grad, rtol=1e-8, atol=1e-8)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layer.base.weight, base.weight)


@pytest.mark.parametrize(
    ("make", "targets", "name"),
    [
        (tiny_llama, ["q_proj", "up_proj"], "pissa"),
        (tiny_llama, ["q_proj", "up_proj"], "olora"),
        (tiny_gpt2, ["c_attn"], "pissa"),  # PEFT's OLoRA forgets that Conv1D keeps its weight transposed
        (tiny_bert, ["query"], "olora"),
    ],
)
def test_the_start_is_pefts_up_to_the_base_it_writes(make, targets, name):
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=name)
    )
    model = make()
    attach(model, LoRA(rank=3, alpha=5, targets=targets, initialise=name))
    starts = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    ours = adapter_parameters(model)
    assert len(starts) == len(ours)
    for (_, one), (_, other) in zip(sorted(starts.items()), sorted(ours.items()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", FROM_WEIGHT)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_t5])
def test_the_file_is_a_plain_lora_of_twice_the_rank(make, name, rslora, tmp_path):
    model = make()
    attach(model, LoRA(rank=3, alpha=5, targets=r".*(q_proj|c_attn|\.q)", initialise=name, rslora=rslora,
                       rank_pattern={r".*\.1\..*": 4}, alpha_pattern={r".*\.0\..*": 7}))  # fmt: skip
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save(model, tmp_path)
    again = make()
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(output(theirs), output(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"started from the weights .* detach it first"):
        load(model, tmp_path)


def test_what_has_no_matrix_has_no_such_start():
    with pytest.raises(
        ValueError, match=r'initialise="pissa" is for linear layers, and model.embed_tokens is an embed'
    ):
        attach(tiny_llama(), LoRA(rank=2, alpha=3, targets=["embed_tokens"], initialise="pissa"))
    with pytest.raises(TypeError, match="an embedding starts in one way"):
        LoRAEmbedding(nn.Embedding(5, 3), rank=2, alpha=3, initialise="olora")
    with pytest.raises(ValueError, match='DoRA starts with "kaiming" or "gaussian"'):
        DoRA(rank=2, alpha=3, initialise="pissa")
    with pytest.raises(ValueError, match="needs an even one; got 3"):
        attach(tiny_llama(), LoRA(rank=3, alpha=3, initialise="orthogonal"))
    for wrong in ("pissa_niter_0", "pissa_niter_", "Pissa", None):
        with pytest.raises(ValueError, match="initialise must be one of"):
            LoRA(rank=2, alpha=3, initialise=wrong)
    bare = nn.Module()
    bare.in_features, bare.out_features = 5, 3
    with pytest.raises(TypeError, match=r"taken from a floating weight .*; Module has none"):
        LoRALinear(bare, rank=2, alpha=3, initialise="olora")


def test_a_base_of_another_layout_and_dtype():
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(13, 11).to(torch.bfloat16)
    layer = LoRAConv1D(base, rank=3, alpha=5, initialise="pissa")
    assert layer.lora_a.dtype == torch.float32
    rest = base.weight.float() - layer.scaling * (layer.lora_b @ layer.lora_a).T
    values = torch.linalg.svdvals(base.weight.float())
    torch.testing.assert_close(torch.linalg.svdvals(rest)[:5], values[3:8], rtol=1e-4, atol=1e-4)
    x = torch.randn(7, 11, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), base(x), rtol=1e-2, atol=1e-2)
