"""A SLURM of one node on this machine: munge, controller and node, in a folder of their own."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sacctmgr")
_FIND = os.environ["PATH"] + ":/usr/sbin:/sbin"
_STARTS = 30.0  # seconds in which it has to be there


class NoSlurm(Exception):
    """Why there can be no SLURM here."""


class Slurm:
    """A context with a cluster of the partitions "low", whose jobs yield to those of "high" after `grace` seconds."""

    def __init__(self, folder: Path, grace: int) -> None:
        self.folder, self.grace = folder, grace
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        if missing := [name for name in _PROGRAMS if shutil.which(name, path=_FIND) is None]:
            raise NoSlurm(f"not installed: {', '.join(missing)} (packages slurm-wlm and munge)")
        if os.geteuid():
            raise NoSlurm("its programs have to be started by root")
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = self.folder / "munge.socket"
        places = {"key-file": key, "socket": munge}
        places |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        (self.folder / "slurm.conf").write_text(self._settings(munge))
        try:
            self._start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in places.items()))
            self._wait("munge answers", munge.exists)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", "here")
            self._wait("the node is free", lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if len(self._processes) > 1:
            self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """What one of its commands prints."""
        done = subprocess.run(
            command, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout.strip()

    @property
    def environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _FIND}

    def _start(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.out").open("w")
        program = shutil.which(name, path=_FIND)
        assert program
        self._processes.append(
            subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log, cwd=self.folder)
        )
        log.close()

    def _wait(self, what: str, condition) -> None:
        deadline = time.monotonic() + _STARTS
        while not condition():
            ended = [process.args[0] for process in self._processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = "\n".join(path.read_text()[-2000:] for path in self.folder.glob("*.out"))
                raise NoSlurm(f"until {what}: {', '.join(ended) or 'no'} program ended in {_STARTS:.0f} s: {said}")
            time.sleep(0.1)

    def _settings(self, munge: Path) -> str:
        name = socket.gethostname().partition(".")[0]
        return f"""
ClusterName=here
SlurmctldHost={name}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={munge},cred_expire=5
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/slurmd.pid
StateSaveLocation={self.folder}/state
SlurmdSpoolDir={self.folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
NodeName=here NodeHostname={name} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=low Nodes=here Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace} MaxTime=60 State=UP
PartitionName=high Nodes=here PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
"""


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
