"""The plan: peak memory and time of a training, predicted on a simulated accelerator. The trainer runs without it."""

DOES_NOT_FIT = 3  # exit status of `plan`, whose figures it comes with
