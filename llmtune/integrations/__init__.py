"""The doors into Hugging Face's own code."""

from llmtune.integrations.transformers_attention import register
from llmtune.integrations.transformers_loss import trainer_loss
from llmtune.integrations.transformers_support import refusal
from llmtune.integrations.transformers_trainer import with_loss

__all__ = ["refusal", "register", "trainer_loss", "with_loss"]
