"""A plan for people: a line for each phase, and bars for what its peak consists of."""

from dataclasses import asdict, dataclass
from typing import Any

from finetune.memory.trace import Peak

GIB = 2**30
_WIDTH = 40


@dataclass(frozen=True)
class Phase:
    """A part of a run, with the peaks of the device and of one process's host memory in it."""

    name: str
    device: Peak
    host: Peak


@dataclass(frozen=True)
class Plan:
    """What a training takes of each of `gpus` GPUs, which have `capacity` bytes if that is known."""

    gpus: int
    capacity: int | None
    phases: list[Phase]

    @property
    def highest(self) -> Phase:
        """The phase that reserves most."""
        return max(self.phases, key=lambda phase: phase.device.reserved)

    @property
    def fits(self) -> bool | None:
        return None if self.capacity is None else self.highest.device.reserved <= self.capacity

    def as_json(self) -> dict[str, Any]:
        """All figures, in bytes."""
        return {**asdict(self), "fits": self.fits}

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> "Plan":
        """The plan whose `as_json` this is."""
        phases = [Phase(each["name"], Peak(**each["device"]), Peak(**each["host"])) for each in figures["phases"]]
        return cls(figures["gpus"], figures["capacity"], phases)

    def lines(self) -> list[str]:
        """The plan in words and bars."""
        lines = [f"{'GiB':24} {'allocated':>10} {'reserved':>10} {'host memory':>12}"]
        for phase in self.phases:
            device, host = phase.device, phase.host
            figures = (device.allocated, device.reserved, host.requested)
            lines.append("{:24} {:10.2f} {:10.2f} {:12.2f}".format(phase.name, *(size / GIB for size in figures)))
        peak = self.highest.device
        lines += ["", f"The peak is in {self.highest.name}, {peak.running}:"]
        most = max(peak.parts.values())
        for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]):
            if size >= 0.01 * peak.requested:
                lines.append(f"  {name:18} {size / GIB:8.2f}  {'#' * max(1, round(_WIDTH * size / most))}")
        return [*lines, "", self.verdict]

    @property
    def verdict(self) -> str:
        """Whether it fits, and by how much not."""
        needs = f"{self.highest.device.reserved / GIB:.2f} GiB"
        each = "a GPU" if self.gpus == 1 else f"each of {self.gpus} GPUs"
        if self.capacity is None:
            return f"{each} needs {needs}, beside what its driver takes; --device-memory 24GiB says whether it fits"
        difference = abs(self.capacity - self.highest.device.reserved) / GIB
        if self.fits:
            return f"fits: {each} needs {needs} of {self.capacity / GIB:.2f}, beside what its driver takes"
        return f"does not fit: {each} needs {needs}, {difference:.2f} GiB more than there are"


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB", "24 GB", "25769803776B" or "24" (GiB). Raises ValueError."""
    units = {"": GIB, "gib": GIB, "g": GIB, "gb": 10**9, "mib": 2**20, "mb": 10**6, "b": 1}
    number = text.strip().rstrip("GgIiBbMm ")
    unit = text.strip()[len(number) :].strip().lower()
    if unit not in units or float(number) <= 0:
        raise ValueError(f"{text!r} is no amount of memory; write 24GiB, or 24GB")
    return int(float(number) * units[unit])
