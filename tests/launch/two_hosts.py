"""Two hosts on one machine: network namespaces with names of their own, joined by a cable that can be pulled out."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from processes import ROOT

DEADLINE = 100.0  # seconds that any one wait may take
_NETWORK = "10.213.7"


def why_impossible() -> str:
    """Why there can be no such hosts here; empty if there can."""
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    tried = subprocess.run(
        ["ip", "netns", "exec", name, "unshare", "--uts", "true"], capture_output=True, text=True, check=False
    )
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"no name for a host can be made: {tried.stderr.strip()}" if tried.returncode else ""


class Host:
    """One of the two, its address, and the trainings that were started on it."""

    def __init__(self, number: int) -> None:
        self.name, self.address = f"host{number}", f"{_NETWORK}.{number}"
        self.namespace, self.cable = f"ft{os.getpid()}h{number}", f"ft{os.getpid() % 100000}c{number}"
        self.processes: list[subprocess.Popen] = []

    def inside(self, *command: str) -> list[str]:
        """A command that runs on this host."""
        own_name = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *own_name, *command]

    def start(self, log: Path, recipe: Path, settings: Sequence[str], **variables: str) -> "Training":
        """launch/nodes.sh on this host, with one process."""
        chosen = [part for setting in settings for part in ("--set", setting)]
        command = self.inside(str(ROOT / "launch" / "nodes.sh"), str(recipe), *chosen)
        given = {"GPUS": "1", "NODES": "2", "GLOO_SOCKET_IFNAME": self.cable, **variables}
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | given, stdout=file, stderr=file, start_new_session=True
            )
        self.processes.append(process)
        return Training(process, log)

    def runs(self, words: str) -> bool:
        """Whether a process with these words in its command runs here."""
        commands = (Path(f"/proc/{pid}/cmdline") for pid in self.pids())
        return any(words in path.read_bytes().replace(b"\0", b" ").decode() for path in commands if path.exists())

    def pids(self) -> list[str]:
        """The ids of the processes on this host."""
        found = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        return found.stdout.split()

    def pull_cable(self, out: bool = True) -> None:
        """Cut this host off, or join it again."""
        subprocess.run(
            ["ip", "netns", "exec", self.namespace, "ip", "link", "set", self.cable, "down" if out else "up"],
            check=True,
        )


class Training:
    """A training on one of the hosts."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def said(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = DEADLINE) -> int:
        """Its exit status."""
        return self.process.wait(seconds)


class TwoHosts:
    """A context with two hosts, which leaves nothing behind."""

    def __enter__(self) -> list[Host]:
        self.hosts = [Host(1), Host(2)]
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
        one, two = self.hosts
        _ip("link", "add", one.cable, "netns", one.namespace, "type", "veth", "peer", two.cable, "netns", two.namespace)
        for host in self.hosts:
            for command in (
                ("link", "set", "lo", "up"),
                ("address", "add", f"{host.address}/24", "dev", host.cable),
                ("link", "set", host.cable, "up"),
            ):
                _ip("-n", host.namespace, *command)
        return self.hosts

    def __exit__(self, *error: object) -> None:
        for host in self.hosts:
            subprocess.run(["kill", "-KILL", *host.pids()], check=False, capture_output=True)
            for process in host.processes:
                process.wait(DEADLINE)
            _ip("netns", "delete", host.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def wait_until(condition: Callable[[], bool], trainings: Sequence[Training]) -> None:
    """Watch trainings until something is true; an error if one ends before."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        for training in trainings:
            assert training.process.poll() is None, training.said
        assert time.monotonic() < deadline, "\n".join(training.said for training in trainings)
        time.sleep(0.01)
