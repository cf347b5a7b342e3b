"""Regularizers: penalties, consistency losses and noise, for a large model that meets a small data set."""

__all__: list[str] = []
