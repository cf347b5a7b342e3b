"""A training loop to subclass, its settings, its random state and its checkpoints."""

from llmtune.training.background import CheckpointWriter
from llmtune.training.checkpoint import newest_valid, write_checkpoint
from llmtune.training.checkpoint_read import read_checkpoint, verify_checkpoint
from llmtune.training.history import History
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import fixed_randomness
from llmtune.training.settings import LoopSettings

__all__ = [
    "CheckpointWriter",
    "History",
    "LoopSettings",
    "TrainingLoop",
    "fixed_randomness",
    "newest_valid",
    "read_checkpoint",
    "verify_checkpoint",
    "write_checkpoint",
]
