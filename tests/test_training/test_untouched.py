"""A look at a model leaves no trace."""

import pytest
import torch
from torch import nn

from llmtune.training.untouched import PACKED, untouched


class Config:
    def __init__(self):
        self.use_cache, self.sizes = False, [3, 5]


def model():
    made = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
    made.config = Config()
    return made


@pytest.mark.parametrize("broken", [False, True])
def test_everything_is_put_back(broken):
    made = model().train()
    made[2].eval()
    made[0].weight.grad = torch.ones(7, 5)
    own = dict(made.named_buffers())
    before = {name: buffer.clone() for name, buffer in own.items()}
    gradient, state = made[0].weight.grad, torch.get_rng_state()
    try:
        with untouched(made, training=True):
            assert made[2].training
            assert made[0].weight.grad is None
            made(torch.randn(11, 5)).sum().backward()
            made[1].running_var = torch.zeros(7)
            made.config.use_cache, made.config.more = True, 1
            if broken:
                raise RuntimeError
    except RuntimeError:
        pass
    assert [module.training for module in made] == [True, True, False]
    assert made[0].weight.grad is gradient
    assert torch.equal(gradient, torch.ones(7, 5))
    assert made[0].bias.grad is None
    assert all(buffer is own[name] for name, buffer in made.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in own.items())
    assert vars(made.config) == {"use_cache": False, "sizes": [3, 5]}
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_weights_are_not_copied(monkeypatch):
    made = nn.Module()
    made.register_buffer("packed", torch.zeros(PACKED, dtype=torch.uint8))
    cloned = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **_: cloned.append(self.numel()) or self)
    with untouched(made, training=False):
        pass
    assert PACKED not in cloned
