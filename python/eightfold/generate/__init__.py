"""Generation loops."""

from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.generate.image import ImageSampler
from eightfold.generate.text import SamplingOptions, generate

__all__ = ["DiffusionGenerator", "DiffusionOptions", "ImageSampler", "SamplingOptions", "generate"]
