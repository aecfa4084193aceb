"""Optimizers whose states are 8 bits."""

from eightfold.optim.adamw import AdamW
from eightfold.optim.came import CAME8bit

__all__ = ["AdamW", "CAME8bit"]
