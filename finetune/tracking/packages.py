"""The packages of trackers, which are extras: imported when a recipe names the tracker; an error says how to install them."""

import importlib
import os
from types import ModuleType

from finetune.runtime.errors import UserError


def imported(module: str, tracker: str) -> ModuleType:
    """Import a module of a tracker.

    Args:
        tracker: its name in tracking.trackers, which is the name of the extra.
    Raises:
        UserError: it is not installed, or cannot be imported; names the command that installs it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow reports its use over the network otherwise
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _import_error(tracker, error) from None


def _import_error(package: str, error: ImportError) -> UserError:
    """The package is not there, or one that it needs is not, or is too old."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == package:
        what = f"{package} is not installed"
    else:
        what = f"{package} is installed, but cannot be imported ({error})"
    return UserError(what, f'in the checkout: pip install -e ".[{package}]"', "tracking.trackers")
