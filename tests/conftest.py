"""What every test starts from: one thread, since tiny models only wait for more, and the same random state."""

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
