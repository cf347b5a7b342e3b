"""Regularizers: penalties, consistency losses and noise, for a large model that meets a small data set."""

from llmtune.regularizers.mixout import Mixout, mixout
from llmtune.regularizers.mixout_model import mixout_model
from llmtune.regularizers.neftune import neftune, neftune_noise, token_lengths
from llmtune.regularizers.stochastic_depth import drop_residual, stochastic_depth
from llmtune.regularizers.token_noise import token_noise
from llmtune.regularizers.weight_noise import noisy_start, noisy_weights, weight_noise

__all__ = [
    "Mixout",
    "drop_residual",
    "mixout",
    "mixout_model",
    "neftune",
    "neftune_noise",
    "noisy_start",
    "noisy_weights",
    "stochastic_depth",
    "token_lengths",
    "token_noise",
    "weight_noise",
]
