"""Optimizers whose states are 8 bits."""

from eightfold.optim.adamw import AdamW

__all__ = ["AdamW"]
