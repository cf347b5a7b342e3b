"""The main job on an embedded model, `python -m llmtune.quickstart`, and that model."""

from llmtune.quickstart.model import embedded_model

__all__ = ["embedded_model"]
