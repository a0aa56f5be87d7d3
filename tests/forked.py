"""Programs in processes of their own that need not import torch and diffusers anew: forks of one process that has them.

The imports take a processor five seconds, and what a test starts often takes less. A fork is a process like any other: it has
its own arguments, working directory and standard streams, and imports all of `finetune` itself. The suite without its long
matrices starts commands and workers so; with them (or if pytest is run without `-m "not full"`), they are started plainly.

Usage: forked.py      takes requests from standard input, one a line as JSON, and tells a process id and a status of each.
"""

import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

# What the commands and workers import of other packages; they work without it, too, only later.
MODULES = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.tensor.parallel",
    "diffusers.models.autoencoders.vae",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.loaders.peft",
    "transformers.modeling_utils",
    "peft",
    "torchao",
    "av",
    "pydantic.main",
    "rich.console",
)


def run(
    program: Sequence[str], folder: Path, environment: dict[str, str], seconds: float, processes: int = 0
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` gives of `python PROGRAM`: a script, `-m` and a module, or `-c` and code, with arguments.

    If there are `processes`, they are started as torchrun starts them, and end with the first of them that fails.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as written:
        out, err = Path(written) / "out", Path(written) / "err"
        request: dict[str, Any] = {
            "program": [str(part) for part in program],
            "folder": str(folder),
            "environment": environment,
            "out": str(out),
            "err": str(err),
            "processes": processes,
        }
        assert server.stdin
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        pid = int(_line(server, 60))
        try:
            status = int(_line(server, seconds))
        except TimeoutError:
            os.killpg(pid, signal.SIGKILL)
            _line(server, 60)
            raise subprocess.TimeoutExpired(request["program"], seconds, out.read_bytes(), err.read_bytes()) from None
        return subprocess.CompletedProcess(request["program"], status, out.read_text(), err.read_text())


@cache
def _server() -> subprocess.Popen[bytes]:
    """The process that is forked, which ends with this one."""
    start = [sys.executable, str(Path(__file__))]  # what the imports say to standard error is torchao's
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # each fork has its own
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(start, env=variables, stdin=pipe, stdout=pipe, stderr=nothing, bufsize=0)


def _line(server: subprocess.Popen[bytes], seconds: float) -> bytes:
    assert server.stdout
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise TimeoutError
    return server.stdout.readline()


# In the process that is forked


def serve() -> None:
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each fork's collections look through all of it, and copy it
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = _fork(partial(_launch, request) if request["processes"] else partial(_become, request, {}))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _fork(do: Callable[[], None]) -> int:
    if pid := os.fork():
        return pid
    try:
        do()
    finally:  # whatever it was, this process is not to serve
        os._exit(70)


def _launch(request: dict[str, Any]) -> None:
    """Start ranks and the store that they meet at, which is no thread of this process before they are started."""
    os.setsid()
    count, ends, ranks = request["processes"], [], set()
    for rank in range(count):
        reading, writing = os.pipe()
        ends.append(writing)
        ranks.add(_fork(partial(_start_rank, request, rank, reading)))
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for end in ends:
        os.write(end, str(store.port).encode())
        os.close(end)
    failed = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    os._exit(failed)


def _start_rank(request: dict[str, Any], rank: int, reading: int) -> None:
    """Run the program with the variables that torchrun gives to a rank, once the store's port is known."""
    port, count = os.read(reading, 100).decode(), str(request["processes"])
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    _become(request, store | {"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "forked"} | places)


def _become(request: dict[str, Any], further: dict[str, str]) -> None:
    """Run a program as its interpreter would."""
    if not further:
        os.setsid()
    for path, stream in ((os.devnull, 0), (request["out"], 1), (request["err"], 2)):
        flags = os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(path, flags), stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"] | further)
    first, *arguments = request["program"]
    is_script = first not in ("-m", "-c")
    name = first if is_script else arguments.pop(0)
    paths = [path for path in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = [str(Path(name).parent) if is_script else "" if first == "-c" else os.getcwd(), *paths]
    sys.argv = ["-c" if first == "-c" else name, *arguments]
    tempfile.tempdir = None  # it is known of the server's variables
    status = 1
    try:
        if first == "-c":
            exec(compile(name, "<string>", "exec"), sys.modules["__main__"].__dict__)
        elif is_script:
            runpy.run_path(name, run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
