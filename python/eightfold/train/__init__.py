"""Training: configuration, packed data, the loop, checkpoints, several processes, logs and plots, the demo."""
