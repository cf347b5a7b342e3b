"""Adapters draw their start from torch's own random state: the same for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
