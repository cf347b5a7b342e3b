"""Which parameters Muon gets, for the four shapes of model, and a run in the loop with both optimizers."""

import re
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import LoRA, attach
from llmtune.optim import Together, muon_groups, parameter_groups
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_qwen3_moe, tiny_t5
from llmtune.training import LoopSettings, TrainingLoop

HIDDEN = {  # expressions for the whole names of what Muon trains
    "llama": r"model\.layers\.\d\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight",
    "gpt2": r"transformer\.h\.\d\.(attn|mlp)\.(c_attn|c_proj|c_fc)\.weight",
    "classifier": r"bert\.encoder\.layer\.\d\..*(query|key|value|dense)\.weight",
    "t5": r"(encoder|decoder)\.block\.\d\.layer\.\d\..*\.(q|k|v|o|wi|wo)\.weight",
    "moe": r"model\.layers\.\d\.(self_attn\.[qkvo]_proj\.weight|mlp\.gate\.weight)",
}
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "classifier": partial(tiny_bert, labels=3), "t5": tiny_t5,
          "moe": tiny_qwen3_moe}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_muon_gets_the_matrices_in_layers_and_adamw_the_rest(kind):
    model = MODELS[kind]()
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, layer_decay=0.5)
    hidden, rest = muon_groups(model, groups, ratio=20.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [sorted(names[id(p)] for group in side for p in group["params"]) for side in (hidden, rest)]
    wanted = [name for name in names.values() if re.fullmatch(HIDDEN[kind], name)]
    assert found[0] == sorted(wanted)
    assert found[0]
    assert sorted(found[0] + found[1]) == sorted(names.values())
    rates = {id(p): (g["name"], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    for side, ratio in ((hidden, 20.0), (rest, 1.0)):
        for group in side:
            for p in group["params"]:
                name, rate, decay = rates[id(p)]
                assert (group["name"], group["lr"], group["weight_decay"]) == (name, rate * ratio, decay)
    Together(torch.optim.Muon(hidden), torch.optim.AdamW(rest))


def test_under_lora_a_and_b_in_layers_are_muons():
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=6, targets=["q_proj", "embed_tokens"]))
    hidden, rest = muon_groups(model, parameter_groups(model, learning_rate=1e-3))
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rpartition(".")[2] for g in hidden for p in g["params"]} == {"lora_a", "lora_b"}
    assert all("q_proj" in names[id(p)] for g in hidden for p in g["params"])
    assert all("embed_tokens" in names[id(p)] for g in rest for p in g["params"])


class WithMuon(TrainingLoop):
    def configure_optimizer(self):
        groups = parameter_groups(self.model, learning_rate=self.settings.learning_rate, weight_decay=0.1)
        hidden, rest = muon_groups(self.model, groups, ratio=2.0)
        muon = torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")
        optimizer = Together(muon, torch.optim.AdamW(rest))
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def trained(folder, precision="float32", stop=None):
    settings = LoopSettings(
        max_steps=5, rows_per_step=4, learning_rate=3e-3, progress=False, folder=folder, save_every=1,
        precision=precision,
    )  # fmt: skip
    loop = WithMuon(tiny_llama(), uneven_rows(11), settings=settings)
    taken = loop.training_step

    def stopping(batches):
        if loop.step == stop:
            raise KeyboardInterrupt
        return taken(batches)

    loop.training_step = stopping
    if stop is None:
        loop.fit(resume=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            loop.fit(resume=True)
    return loop


@pytest.mark.parametrize("precision", ["float32", "fp16"])
def test_a_run_with_both_ends_with_the_same_bits_when_it_is_resumed(precision, tmp_path):
    whole = trained(tmp_path / "whole", precision)
    trained(tmp_path / "cut", precision, stop=3)
    cut = trained(tmp_path / "cut", precision)
    for (name, p), (_, q) in zip(whole.model.named_parameters(), cut.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert [row["loss"] for row in whole.history] == [row["loss"] for row in cut.history]
    rates = [group["lr"] for group in cut.optimizer.param_groups]
    taken = 5 - sum(row.get("overflow", 0) for row in cut.history)
    assert rates == pytest.approx([6e-3 * 0.9**taken, 3e-3 * 0.9**taken, 3e-3 * 0.9**taken])
    state = cut.optimizer.state
    kinds = {frozenset(state[p]) for group in cut.optimizer.param_groups for p in group["params"]}
    assert kinds == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}


def test_refusals():
    model = tiny_llama()
    groups = parameter_groups(model, learning_rate=1e-3)
    with pytest.raises(ValueError, match="ratio must be a number above 0; got 0"):
        muon_groups(model, groups, ratio=0)
    plain = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(
        ValueError, match=r"muon_groups goes by layer numbers .* this Sequential has none \(a name: 0.w"
    ):
        muon_groups(plain, parameter_groups(plain, learning_rate=1.0))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match="none of the groups' parameters is a matrix in a layer"):
        muon_groups(model, parameter_groups(model, learning_rate=1.0))
    with pytest.raises(TypeError, match="a model, that is a torch module, is expected"):
        muon_groups(None, groups)


def test_tables_in_a_layer_are_told_each_by_its_own_sign():
    """A table that is an embedding by its kind, one by its name, and one that is a bias: none is a map of states."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 3)
            self.pos_embed, self.bias = nn.Parameter(torch.ones(7, 3)), nn.Parameter(torch.ones(5, 3))
            self.up = nn.Linear(3, 5, bias=False)

    model = nn.ModuleDict({"layers": nn.ModuleList([Layer()])})
    hidden, rest = muon_groups(model, parameter_groups(model, learning_rate=1e-3))
    assert [id(p) for group in hidden for p in group["params"]] == [id(model["layers"][0].up.weight)]
    assert sum(len(group["params"]) for group in rest) == 3
