"""Layers that compute and save in FP8, and `convert`, which puts them into a model."""

from eightfold.nn import functional
from eightfold.nn._weight_cache import ServedCodes, WeightCache
from eightfold.nn.convert import DEFAULT_EXCLUDE, ConversionReport, convert
from eightfold.nn.linear import FP8Linear, add_to_grads, cache_weights
from eightfold.nn.mlp import FP8SwiGLU
from eightfold.nn.norm import FP8RMSNorm

__all__ = [
    "DEFAULT_EXCLUDE",
    "ConversionReport",
    "FP8Linear",
    "FP8RMSNorm",
    "FP8SwiGLU",
    "ServedCodes",
    "WeightCache",
    "add_to_grads",
    "cache_weights",
    "convert",
    "functional",
]
