"""Generation loops."""

from .text import SamplingOptions, generate

__all__ = ["SamplingOptions", "generate"]
