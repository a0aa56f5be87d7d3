"""Processes, devices, seeds, signals, files and logs. All other rooms build on this one."""
