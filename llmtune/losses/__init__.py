"""Losses: functions of tensors that never build a language model's logits, and losses of a batch made of them."""

from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import ClassificationLoss, classification_loss
from llmtune.losses.confidence import ConfidencePenaltyLoss, confidence_penalty
from llmtune.losses.contrastive import info_nce_loss, prototypical_loss, supervised_contrastive_loss
from llmtune.losses.cross_entropy import linear_cross_entropy
from llmtune.losses.divergence import kl_divergence, linear_kl_divergence
from llmtune.losses.embedding import sentence_embeddings
from llmtune.losses.features import FeatureDistillationLoss, feature_distillation_loss
from llmtune.losses.focal import FocalLoss, focal_loss
from llmtune.losses.head import Head, hidden_before_head, model_inputs
from llmtune.losses.masked_lm import MaskedLMLoss, masked_lm_loss
from llmtune.losses.own_classes import OwnClassesLoss, own_classes_cross_entropy
from llmtune.losses.packed import check_documents_apart, document_leak
from llmtune.losses.preference import DPOLoss, dpo_loss
from llmtune.losses.prototypical import PrototypicalLoss
from llmtune.losses.sequence import sequence_log_probabilities
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss, sequence_to_sequence_loss
from llmtune.losses.supervised_contrastive import SupervisedContrastiveLoss
from llmtune.losses.token_loss import head_cross_entropy
from llmtune.losses.top_k import top_k_kl_divergence, top_k_log_probabilities

__all__ = [
    "CausalLMLoss",
    "ClassificationLoss",
    "ConfidencePenaltyLoss",
    "DPOLoss",
    "FeatureDistillationLoss",
    "FocalLoss",
    "Head",
    "MaskedLMLoss",
    "OwnClassesLoss",
    "PrototypicalLoss",
    "SequenceToSequenceLoss",
    "SupervisedContrastiveLoss",
    "causal_lm_loss",
    "check_documents_apart",
    "classification_loss",
    "confidence_penalty",
    "document_leak",
    "dpo_loss",
    "feature_distillation_loss",
    "focal_loss",
    "head_cross_entropy",
    "hidden_before_head",
    "info_nce_loss",
    "kl_divergence",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "masked_lm_loss",
    "model_inputs",
    "own_classes_cross_entropy",
    "prototypical_loss",
    "sentence_embeddings",
    "sequence_log_probabilities",
    "sequence_to_sequence_loss",
    "supervised_contrastive_loss",
    "top_k_kl_divergence",
    "top_k_log_probabilities",
]
