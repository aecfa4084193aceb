"""Generation loops."""

from eightfold.generate.text import SamplingOptions, generate

__all__ = ["SamplingOptions", "generate"]
