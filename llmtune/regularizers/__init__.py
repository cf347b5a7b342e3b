"""Regularizers: penalties, consistency losses and noise, for a large model that meets a small data set."""

from llmtune.regularizers.child_mask import child_mask
from llmtune.regularizers.child_tuning import ChildTuning
from llmtune.regularizers.decoupled_l2sp import DecoupledL2SP, pull_back
from llmtune.regularizers.delta_norm import DeltaNorm
from llmtune.regularizers.flooding import Flooding, flood
from llmtune.regularizers.freelb import FreeLBLoss
from llmtune.regularizers.head_start import linear_probe, nearest_mean_head
from llmtune.regularizers.l2sp import L2SP
from llmtune.regularizers.mixing import Pairs, mixup, mixup_loss, mixup_pairs
from llmtune.regularizers.mixout import Mixout, mixout
from llmtune.regularizers.mixout_model import mixout_model
from llmtune.regularizers.mixup_classifier import MixupLoss
from llmtune.regularizers.neftune import neftune, neftune_noise, token_lengths
from llmtune.regularizers.products import product_norms
from llmtune.regularizers.rdrop import RDropLoss, r_drop_loss
from llmtune.regularizers.smart import SmartLoss, smart_loss
from llmtune.regularizers.stochastic_depth import drop_residual, stochastic_depth
from llmtune.regularizers.symmetric import symmetric_kl
from llmtune.regularizers.token_noise import token_noise
from llmtune.regularizers.weight_noise import noisy_start, noisy_weights, weight_noise

__all__ = [
    "L2SP",
    "ChildTuning",
    "DecoupledL2SP",
    "DeltaNorm",
    "Flooding",
    "FreeLBLoss",
    "Mixout",
    "MixupLoss",
    "Pairs",
    "RDropLoss",
    "SmartLoss",
    "child_mask",
    "drop_residual",
    "flood",
    "linear_probe",
    "mixout",
    "mixout_model",
    "mixup",
    "mixup_loss",
    "mixup_pairs",
    "nearest_mean_head",
    "neftune",
    "neftune_noise",
    "noisy_start",
    "noisy_weights",
    "product_norms",
    "pull_back",
    "r_drop_loss",
    "smart_loss",
    "stochastic_depth",
    "symmetric_kl",
    "token_lengths",
    "token_noise",
    "weight_noise",
]
