"""A training loop to subclass, its settings, random state, checkpoints and processes, and what may watch it."""

from llmtune.training.average_weights import AverageWeights
from llmtune.training.background import CheckpointWriter
from llmtune.training.best import KeepBest
from llmtune.training.checkpoint import newest_valid, write_checkpoint
from llmtune.training.checkpoint_read import read_checkpoint, verify_checkpoint
from llmtune.training.csv_log import CsvLog
from llmtune.training.distributed import join_processes
from llmtune.training.early_stopping import EarlyStopping
from llmtune.training.generalization_gap import GeneralizationGap
from llmtune.training.gradual_unfreezing import GradualUnfreezing
from llmtune.training.history import History
from llmtune.training.linear_probe import LinearProbeFirst
from llmtune.training.lisa import LISA
from llmtune.training.log_to import LogTo
from llmtune.training.loop import TrainingLoop
from llmtune.training.notebook import NotebookView
from llmtune.training.part_trains import PartTrains
from llmtune.training.profile import Profile
from llmtune.training.randomness import fixed_randomness
from llmtune.training.samples import GenerateSamples
from llmtune.training.sequence import SequenceHistory, TaskSequence
from llmtune.training.sequence_adapters import AdapterPerTask, InfLoRAPerTask, OrthogonalLoRAPerTask
from llmtune.training.sequence_distill import DistillFromCopy, DistillFromEarlier
from llmtune.training.sequence_methods import EWCPerTask, InterpolatePerTask, L2SPToLast, OverTasks, OwnClasses
from llmtune.training.sequence_replay import AveragedGEMPerTask, DarkReplay, Replay
from llmtune.training.sequence_task import Task, TaskMethod, TaskRun
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import shard
from llmtune.training.sharpness import SharpnessAware
from llmtune.training.statistics_head import HeadFromStatistics
from llmtune.training.task_heads import HeadPerTask, TaskHeads
from llmtune.training.top_layers import freeze_first_layers, reinitialise_top_layers
from llmtune.training.utilisation import Utilisation, matmul_ceiling

__all__ = [
    "LISA",
    "AdapterPerTask",
    "AverageWeights",
    "AveragedGEMPerTask",
    "CheckpointWriter",
    "CsvLog",
    "DarkReplay",
    "DistillFromCopy",
    "DistillFromEarlier",
    "EWCPerTask",
    "EarlyStopping",
    "GeneralizationGap",
    "GenerateSamples",
    "GradualUnfreezing",
    "HeadFromStatistics",
    "HeadPerTask",
    "History",
    "InfLoRAPerTask",
    "InterpolatePerTask",
    "KeepBest",
    "L2SPToLast",
    "LinearProbeFirst",
    "LogTo",
    "LoopSettings",
    "NotebookView",
    "OrthogonalLoRAPerTask",
    "OverTasks",
    "OwnClasses",
    "PartTrains",
    "Profile",
    "Replay",
    "SequenceHistory",
    "SharpnessAware",
    "Task",
    "TaskHeads",
    "TaskMethod",
    "TaskRun",
    "TaskSequence",
    "TrainingLoop",
    "Utilisation",
    "fixed_randomness",
    "freeze_first_layers",
    "join_processes",
    "matmul_ceiling",
    "newest_valid",
    "read_checkpoint",
    "reinitialise_top_layers",
    "shard",
    "verify_checkpoint",
    "write_checkpoint",
]
