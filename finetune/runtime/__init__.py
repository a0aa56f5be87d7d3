"""Processes, devices, seeds, signals and logs: what every other room stands on."""
