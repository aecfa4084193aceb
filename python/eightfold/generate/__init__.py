"""Generation loops."""

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.generate.text import SamplingOptions, generate

__all__ = ["DiffusionGenerator", "DiffusionOptions", "SamplingOptions", "generate"]
