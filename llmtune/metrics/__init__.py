"""Measures of a model: how well it predicts text, whether it is right as often as it is sure, and what it forgets."""

from llmtune.metrics.calibration import CalibrationBins, brier_score, expected_calibration_error, top_predictions
from llmtune.metrics.continual import ContinualMatrix, continual_summary
from llmtune.metrics.continual_plot import compare_curves, curves, heat_map
from llmtune.metrics.intervals import (
    Interval,
    mean_and_interval,
    paired_difference,
    student_t_probability,
    student_t_quantile,
)
from llmtune.metrics.language import perplexity

__all__ = [
    "CalibrationBins",
    "ContinualMatrix",
    "Interval",
    "brier_score",
    "compare_curves",
    "continual_summary",
    "curves",
    "expected_calibration_error",
    "heat_map",
    "mean_and_interval",
    "paired_difference",
    "perplexity",
    "student_t_probability",
    "student_t_quantile",
    "top_predictions",
]
