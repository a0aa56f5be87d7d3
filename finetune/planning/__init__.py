"""The plan: peak memory and time of a training, predicted on a simulated accelerator. The trainer runs without it."""
