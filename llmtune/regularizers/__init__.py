"""Regularizers: penalties, consistency losses and noise, for a large model that meets a small data set."""

from llmtune.regularizers.flooding import Flooding, flood
from llmtune.regularizers.freelb import FreeLBLoss
from llmtune.regularizers.mixing import Pairs, mixup, mixup_loss, mixup_pairs
from llmtune.regularizers.mixup_classifier import MixupLoss
from llmtune.regularizers.rdrop import RDropLoss, r_drop_loss
from llmtune.regularizers.smart import SmartLoss, smart_loss
from llmtune.regularizers.symmetric import symmetric_kl

__all__ = [
    "Flooding",
    "FreeLBLoss",
    "MixupLoss",
    "Pairs",
    "RDropLoss",
    "SmartLoss",
    "flood",
    "mixup",
    "mixup_loss",
    "mixup_pairs",
    "r_drop_loss",
    "smart_loss",
    "symmetric_kl",
]
