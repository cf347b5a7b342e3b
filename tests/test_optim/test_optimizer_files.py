"""What the optimizers keep goes through a safetensors file, and the steps after it are the same to the bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from llmtune.optim.galore import GaLore
from llmtune.optim.mezo import MeZO
from llmtune.optim.sam import SAM
from llmtune.optim.together import Together
from llmtune.training.checkpoint_state import join_tensors, split_tensors

MAKE = {
    "SAM": lambda p: SAM(torch.optim.AdamW(p, lr=1e-2), rho=0.1),
    "ASAM": lambda p: SAM(torch.optim.SGD(p, lr=1e-2, momentum=0.9), rho=0.1, adaptive=True),
    "MeZO": lambda p: MeZO(p, 1e-2, seed=5),
    "GaLore": lambda p: GaLore(p, lr=1e-2, rank=2, update_every=2),
    "Together": lambda p: Together(torch.optim.AdamW(p[1:], lr=1e-2), torch.optim.SGD(p[:1], lr=1e-2, momentum=0.9)),
}


def steps(model, optimizer, first, last):
    for number in range(first, last):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(number))

        def closure(x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if loss.requires_grad:
                loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", MAKE)
def test_steps_after_a_file_are_the_same(name, tmp_path):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = MAKE[name](list(model.parameters()))
    steps(model, optimizer, 0, 3)
    values, tensors = split_tensors(json_keys(optimizer.state_dict()))
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(values), encoding="utf-8")
    other = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    other.load_state_dict(model.state_dict())
    without = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
    without.load_state_dict(model.state_dict())
    resumed, fresh = (MAKE[name](list(some.parameters())) for some in (other, without))
    values = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    resumed.load_state_dict(number_keys(join_tensors(values, load_file(tmp_path / "state.safetensors"))))
    steps(model, optimizer, 3, 6)
    steps(other, resumed, 3, 6)
    steps(without, fresh, 3, 6)
    for end, same in ((other, True), (without, False)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), end.parameters(), strict=True)) == same


def json_keys(state):
    return {**state, "state": {str(key): entry for key, entry in state["state"].items()}}


def number_keys(state):
    return {**state, "state": {int(key): entry for key, entry in state["state"].items()}}
