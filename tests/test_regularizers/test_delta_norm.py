import pytest
import torch

from llmtune.adapters.adalora_config import AdaLoRA
from llmtune.adapters.attach import adapter_layers, adapter_parameters, attach, detach
from llmtune.adapters.bottleneck_config import Bottleneck
from llmtune.adapters.config import DoRA, LoRA
from llmtune.adapters.ia3_config import IA3
from llmtune.adapters.prompt import PromptTuning
from llmtune.adapters.small import BitFit
from llmtune.adapters.vera_config import VeRA
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_t5
from llmtune.testing.small import moved
from llmtune.types import Penalty

EXPERTS = LoRA(
    rank=2, alpha=3, targets=["q_proj"], target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
)
CASES = {
    "llama": (tiny_llama, LoRA(rank=3, alpha=5)),
    "rslora, patterns": (
        tiny_llama,
        LoRA(rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}),
    ),
    "Conv1D": (tiny_gpt2, LoRA(rank=2, alpha=5, lora_bias=True)),
    "embedding": (tiny_llama, LoRA(rank=2, alpha=5, targets=["embed_tokens", "o_proj"])),
    "encoder-decoder": (tiny_t5, LoRA(rank=2, alpha=5)),
    "biases and a copy": (
        lambda: tiny_bert(labels=3),
        LoRA(rank=2, alpha=5, train_bias="all", train_modules=["classifier"], targets=["query", "dense"]),
    ),
    "tokens": (tiny_llama, LoRA(rank=2, alpha=5, train_tokens=[5, 7])),
    "pissa": (tiny_llama, LoRA(rank=2, alpha=5, initialise="pissa")),
    "pissa on Conv1D": (tiny_gpt2, LoRA(rank=2, alpha=5, initialise="pissa")),
    "experts": (tiny_qwen3_moe, EXPERTS),
    "adalora": (tiny_llama, AdaLoRA(initial_rank=3, target_rank=2, alpha=5, total_steps=9)),
    "vera": (tiny_llama, VeRA(rank=7)),
}


def dense(model, name="default"):
    """Return the sum of squares of every change of a weight of that adapter's, written out, in float64."""
    total = 0.0
    for layer in adapter_layers(model, name):
        if type(layer).__name__ not in ("TrainedBias", "TrainedCopy", "NewTokensEmbedding", "NewTokensHead"):
            deltas = {local: value for local, value in layer.deltas().items() if local != "bias"}
            total = total + sum(value.double().square().sum() for value in deltas.values())
    return total


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_norm_with_gradients(case):
    make, config = CASES[case]
    model = make()
    attach(model, config)
    penalty = DeltaNorm(3.0)
    start = penalty(model)
    assert start.item() == 0.0
    start.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
    moved(model, scale=0.3)
    parameters = [p for p in adapter_parameters(model).values() if p.requires_grad]
    value, expected = penalty(model), 1.5 * dense(model)
    assert_close(value.double(), expected, rtol=1e-4)
    got, want = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (value, expected))
    assert any(g is not None for g in want)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=1e-3)


def test_by_hand_each_adapter_alone():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=8, targets=["layers.0.self_attn.k_proj"]), name="one")  # scaling 4
    attach(model, LoRA(rank=1, alpha=3, targets=["layers.0.self_attn.k_proj"]), name="two")  # scaling 3
    for layer in adapter_layers(model):
        with torch.no_grad():
            layer.lora_a.fill_(1.0)
            layer.lora_b.fill_(0.5)
    entries = layer.lora_a.shape[1] * layer.lora_b.shape[0]
    assert DeltaNorm(2.0, name="two")(model).item() == entries * (3 * 0.5) ** 2
    with pytest.raises(ValueError, match='the delta norm of adapter "one" reaches no parameter: all of its are frozen'):
        DeltaNorm(2.0, name="one")(model)
    with torch.no_grad():
        assert DeltaNorm(2.0, name="one")(model).item() == entries * (4 * 2 * 0.5) ** 2
    assert isinstance(DeltaNorm(2.0), Penalty)


def test_it_says_nothing_of_how_the_product_is_split():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    moved(model)
    before = DeltaNorm(1.0)(model).item()
    for layer in adapter_layers(model):
        with torch.no_grad():
            layer.lora_a *= 4.0
            layer.lora_b /= 4.0
    assert DeltaNorm(1.0)(model).item() == pytest.approx(before, rel=1e-6)


def test_at_the_start_a_is_not_pulled():
    """With B = 0 there is no change, and so no gradient; L2 on A and B would have pulled A to zero."""
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    DeltaNorm(1.0)(model).backward()
    assert all(layer.lora_a.any() and not layer.lora_a.grad.any() for layer in adapter_layers(model))


def test_autocast_and_wrappers_change_nothing():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5, dtype=torch.bfloat16))
    moved(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = DeltaNorm(1.0)(torch.compile(torch.nn.DataParallel(model), backend="eager"))
    assert inside.dtype == torch.float32
    assert inside.item() == DeltaNorm(1.0)(model).item() > 0


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_bad_strength(strength):
    with pytest.raises(ValueError, match="strength must be a finite number, 0 or more"):
        DeltaNorm(strength)
    with pytest.raises(TypeError, match=r"strength must be a finite number, 0 or more; got Linear\("):
        DeltaNorm(torch.nn.Linear(3, 2))
    with pytest.raises(TypeError, match="strength must be a finite number, 0 or more; got '1e3'"):
        DeltaNorm("1e3")
    DeltaNorm(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DoRA(rank=2, alpha=3), r'"default" \(DoRA\) has a DoRALinear, whose change is no product of low rank'),
        (IA3(targets=["k_proj"]), r'"default" \(IA3\) has a IA3Linear, .* Use L2SP'),
        (Bottleneck(size=3), "has a BottleneckLayer"),
        (PromptTuning(tokens=3), "has a PromptLayer"),
    ],
)
def test_adapters_that_have_no_such_norm_are_refused(config, message):
    model = tiny_llama()
    attach(model, config)
    with pytest.raises(ValueError, match=message):
        DeltaNorm(1.0)(model)


def test_without_such_an_adapter_it_raises():
    model = tiny_gpt2()
    with pytest.raises(ValueError, match='the model has no adapter "default"; there are: none'):
        DeltaNorm(1.0)(model)
    attach(model, LoRA(rank=2, alpha=2), name="first")
    with pytest.raises(ValueError, match=r'the model has no adapter "frist"; there are: "first". Did you mean "first"'):
        DeltaNorm(1.0, name="frist")(model)
    detach(model, "first")
    attach(model, BitFit())
    with pytest.raises(ValueError, match=r'adapter "default" \(BitFit\) changes no weight by a product of low rank'):
        DeltaNorm(1.0)(model)


def test_equal_layers_are_done_at_once():
    """Twice as many layers take as many operations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    counts = []
    for exclude in (r".*layers\.1\..*", ()):
        model = tiny_llama()
        attach(model, LoRA(rank=3, alpha=5, exclude=exclude))
        moved(model)
        with Names() as seen:
            DeltaNorm(1.0)(model)
        counts.append(len(seen.names))
    assert counts[0] == counts[1]
