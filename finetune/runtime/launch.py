"""Starts a training's processes on this machine, as torchrun does, and prints each error once.

torchrun adds a summary of some thirty lines to an error that a process has told already. Here the process's own line is the
last one, and its exit status is the command's.
"""

import inspect
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from finetune.runtime.errors import UserError

SECONDS_TO_SAVE = 600  # for a checkpoint, once the processes are asked to stop
_TIMEOUT = "shutdown_timeout"  # where this release of torch takes it (2.13)


def launch(processes: int, arguments: Sequence[str], on_cpu: bool = False) -> int:
    """Run `python -m finetune ARGUMENTS` in several processes; returns the exit status of the first that fails, or 0.

    SIGTERM, SIGINT, SIGHUP and SIGQUIT are passed on, and SIGUSR1, which saves a checkpoint and ends the run, too.

    Args:
        on_cpu: they need no GPU.
    Raises:
        UserError: there are fewer GPUs.
    """
    import torch

    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not on_cpu and 0 < found < processes:
        raise UserError(f"{processes} GPUs are asked for, and this machine has {found}", f"--gpus {found}", "--gpus")
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in ("torch.distributed", *logging.root.manager.loggerDict):  # it tells what the processes have told
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # many have a level of their own
    patience: dict[str, Any] = {_TIMEOUT: SECONDS_TO_SAVE}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="finetune",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        **(patience if _TIMEOUT in inspect.signature(LaunchConfig).parameters else {}),
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "finetune", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return 128 - first.exitcode if first.exitcode < 0 else first.exitcode
    except SignalException as error:
        return 128 + signal.Signals(error.sigval)
    return 0
