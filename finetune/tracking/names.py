"""Names of metrics in groups, as dashboards show them together."""

_GROUPS = {
    "heldout_": "heldout",
    "grad_norm/": "blocks",
    "peak_memory_": "memory",
    "seconds_per_step": "time",
    "samples_per_second": "time",
    "data_wait_seconds": "time",
    "checkpoint_": "time",
    "mfu": "time",
}


def grouped(name: str) -> str:
    """A metric's name in its group: train/, heldout/, blocks/, time/ or memory/."""
    for beginning, group in _GROUPS.items():
        if name.startswith(beginning):
            return f"{group}/{name.removeprefix(f'{group}_').removeprefix('grad_norm/')}"
    return f"train/{name}"
