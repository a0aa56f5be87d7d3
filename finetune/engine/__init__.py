"""The step and everything around it: parallelism, precision, optimizer, checkpoints, export, validation."""
