"""Kernel microbenchmarks, one module a family: `eightfold bench [family ...]`."""

FAMILIES = ("quant", "norm", "activation", "gemm", "optim", "step")
