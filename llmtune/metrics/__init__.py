"""Measures of a model: how well it predicts text, and whether it is right as often as it is sure."""

from llmtune.metrics.calibration import CalibrationBins, brier_score, expected_calibration_error, top_predictions
from llmtune.metrics.language import perplexity

__all__ = [
    "CalibrationBins",
    "brier_score",
    "expected_calibration_error",
    "perplexity",
    "top_predictions",
]
