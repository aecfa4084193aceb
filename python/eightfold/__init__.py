"""eightfold: FP8 and efficient-generation kernels for torch."""
