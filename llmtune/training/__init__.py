"""A training loop to subclass, its settings, its random state and its checkpoints."""

from llmtune.training.history import History
from llmtune.training.loop import TrainingLoop
from llmtune.training.packed import document_leak
from llmtune.training.randomness import fixed_randomness
from llmtune.training.settings import LoopSettings

__all__ = ["History", "LoopSettings", "TrainingLoop", "document_leak", "fixed_randomness"]
