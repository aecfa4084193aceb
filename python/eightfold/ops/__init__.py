"""Public functions over torch.ops.eightfold.*, one module a family."""
