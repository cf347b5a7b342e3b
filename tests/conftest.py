"""One thread for tiny models: more only wait for each other."""

import torch

torch.set_num_threads(1)
