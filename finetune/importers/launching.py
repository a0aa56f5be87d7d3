"""Of a command line: how many GPUs it is started on, and where its own options begin."""

import re

_COUNTS = ("--nproc_per_node", "--nproc-per-node", "--num_processes", "--num-processes", "--num_gpus", "--num-gpus")


def split_command(words: list[str], position: int) -> tuple[list[str], list[str]]:
    """The launcher's words, and those behind the script's name, which is at `position`."""
    return words[:position], words[position + 1 :]


def launched_gpus(launcher: list[str]) -> int:
    """The processes that torchrun, accelerate or deepspeed would start; 1 if the words do not tell."""
    values = _options(launcher)
    nodes = _number(values.get("--nnodes") or values.get("--num_nodes")) or 1
    for name in _COUNTS:
        if count := _number(values.get(name)):
            return count if "processes" in name else count * nodes
    for name in ("--gpu_ids", "--gpu-ids", "--include"):
        if ids := values.get(name):
            return max(1, len([each for each in ids.rpartition(":")[2].split(",") if each.strip()]))
    if match := re.search(r"_(\d+)\.ya?ml$", values.get("--config_file", "")):
        return max(1, int(match[1]))  # of finetrainers' accelerate_configs
    return 1


def _options(words: list[str]) -> dict[str, str]:
    values = {}
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            values[name] = value if equals else (words[number + 1] if number + 1 < len(words) else "")
    return values


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0
