"""Kernel microbenchmarks, one module a family: `eightfold bench [family ...]`."""

FAMILIES = (
    "quant",
    "norm",
    "modulate",
    "conv",
    "pixels",
    "activation",
    "rotary",
    "attention",
    "block_attention",
    "linear_attention",
    "gemm",
    "gemm_small",
    "loss",
    "sampling",
    "confidence",
    "optim",
)
LONG = (
    "step",
    "decode",
    "rl",
    "rl_training",
    "diffusion",
    "image",
)  # whole layers, steps and models, with compiles: minutes, so only by name
PARTED = ("step", "image")  # of which parts can be run by themselves
