"""A training loop to subclass, its settings, its random state and its checkpoints."""

from llmtune.training.history import History
from llmtune.training.loop import TrainingLoop
from llmtune.training.randomness import fixed_randomness
from llmtune.training.settings import LoopSettings

__all__ = ["History", "LoopSettings", "TrainingLoop", "fixed_randomness"]
