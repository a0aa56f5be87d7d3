"""Calls one function with a `Bench`, and writes how it ended: python -m benchmarks.gpu.first.worker MODULE:FUNCTION OUT FOLDER."""

import argparse
import importlib
import json
import os
import traceback
from dataclasses import asdict
from pathlib import Path

from benchmarks.gpu.first.bench import TAIL, Bench, Failed, Outcome, Skipped
from finetune.runtime import distributed
from finetune.runtime.exit import leave
from finetune.runtime.signals import end_with_parent


def outcome_of(call: str, bench: Bench) -> Outcome:
    """Call a function named as module:function."""
    module, _, name = call.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)(bench)
    except Skipped as reason:
        return Outcome("skipped", text=str(reason), notes=bench.notes)
    except Failed as reason:
        return Outcome("failed", text=str(reason), notes=bench.notes)
    except Exception as error:
        lines = "".join(traceback.format_exception(error)).splitlines()
        text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return Outcome("failed", text=text, trace=lines[-TAIL:], notes=bench.notes)
    return Outcome("passed", value, value if isinstance(value, str) else "", notes=bench.notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("call")
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    end_with_parent()
    outcome = outcome_of(arguments.call, Bench(arguments.folder, arguments.smoke))
    if int(os.environ.get("RANK", 0)) == 0:
        arguments.out.write_text(json.dumps(asdict(outcome)))
    if outcome.kind == "failed":
        print("\n".join([outcome.text, *outcome.trace]), flush=True)
        leave(1)  # its peers, if it has any, may wait for it in vain
    distributed.stop()
    leave(0)


if __name__ == "__main__":
    main()
