"""A plan: the phases of a run with their peaks, as JSON and as a table with bars."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finetune.planning.gpus import Hardware
from finetune.planning.trace import Peak
from finetune.recipe import Bucket
from finetune.runtime.device import PeakMemory
from finetune.runtime.gpus import GPUS, Gpu
from finetune.runtime.units import GIB

if TYPE_CHECKING:  # a training that reads a plan does not import the simulation
    from finetune.planning.cost import Cost

_WIDTH, _BAR = 40, 17  # characters of bars: a row has 80


@dataclass(frozen=True)
class Phase:
    """A part of a run, with the peaks of the device and of one process's host memory in it.

    Attributes:
        kind: "encode text" or another kind of item, "load", "step", "validation", or "export".
        shape: of the bucket or prompt that is encoded, trained or generated; None if the phase has none.
        flops, seconds: of an optimizer step on one GPU; the time is estimated by the roofline model. None for other phases.
        seconds_on: the same time on every GPU of `GPUS`, by its name, whatever its memory. Empty for other phases.
    """

    kind: str
    shape: Bucket | None
    device: Peak
    host: Peak
    flops: int | None = None
    seconds: float | None = None
    seconds_on: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Kind and shape, as the table has it."""
        return f"{self.kind} {self.shape}" if self.shape else self.kind

    def with_cost(self, cost: Cost, gpu: Gpu | None, overlaps: bool) -> Phase:
        """The same phase with the FLOPs of a step, and with its time if there is a GPU; for `overlaps` see `Cost.seconds`."""
        seconds_on = {name: cost.seconds(each, overlaps) for name, each in GPUS.items()}
        return replace(
            self, flops=cost.flops, seconds=cost.seconds(gpu, overlaps) if gpu else None, seconds_on=seconds_on
        )


@dataclass(frozen=True)
class Plan:
    """The memory that a training takes of each GPU and of the host, phase by phase."""

    hardware: Hardware
    phases: list[Phase]
    notes: list[str] = field(default_factory=list)

    @property
    def highest(self) -> Phase:
        """The phase that reserves most of the GPU's memory."""
        return max(self.phases, key=lambda phase: phase.device.reserved)

    def of_kind(self, kind: str) -> list[Phase]:
        """The phases of one kind, one for each shape."""
        return [phase for phase in self.phases if phase.kind == kind]

    @property
    def step_peak(self) -> PeakMemory:
        """The most that steps take, of any bucket."""
        steps = [phase.device for phase in self.of_kind("step")]
        return PeakMemory(max(step.allocated for step in steps), max(step.reserved for step in steps))

    def with_capacity(self, capacity: int | None) -> Plan:
        """The same plan, judged by another amount of memory of each GPU."""
        return replace(self, hardware=replace(self.hardware, capacity=capacity))

    @property
    def fits(self) -> bool | None:
        """Whether GPU and host memory suffice; None if the limits of both are unknown."""
        limits = (self.hardware.capacity, self.highest.device.reserved), (self.hardware.host_capacity, self.host_bytes)
        known = [needed <= limit for limit, needed in limits if limit is not None]
        return all(known) if known else None

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that a node needs, beside what Python and its libraries take."""
        kept = max(phase.host.requested for phase in self.phases if phase.kind != "export")
        exported = max((phase.host.requested for phase in self.of_kind("export")), default=0)
        return max(self.hardware.processes * kept, exported)  # rank 0 alone gathers whole weights

    def as_json(self) -> dict[str, Any]:
        """All figures as JSON values, in bytes, FLOPs and seconds."""
        phases = [
            {"name": phase.name, **asdict(phase), "shape": phase.shape and str(phase.shape)} for phase in self.phases
        ]
        figures = {"host_bytes": self.host_bytes, "fits": self.fits, "phases": phases, "notes": self.notes}
        return {**asdict(self.hardware), **figures}

    @classmethod
    def from_json(cls, figures: dict[str, Any]) -> Plan:
        """The plan whose `as_json` this is."""
        phases = [
            Phase(
                each["kind"],
                each["shape"] and Bucket.parse(each["shape"]),
                Peak(**each["device"]),
                Peak(**each["host"]),
                each["flops"],
                each["seconds"],
                each["seconds_on"],
            )
            for each in figures["phases"]
        ]
        gpu = figures["gpu"] and Gpu(**figures["gpu"])
        hardware = Hardware(figures["gpus"], figures["per_node"], figures["capacity"], figures["host_capacity"], gpu)
        return cls(hardware, phases, figures["notes"])

    def lines(self) -> list[str]:
        """The plan as a table with bars, and in words."""
        lines = [f"{'GiB':26} {'allocated':>10} {'reserved':>10} {'host memory':>12}"]
        most = max(1, self.highest.device.reserved)
        for phase in self.phases:
            device, host = phase.device, phase.host
            figures = (device.allocated, device.reserved, host.requested)
            row = "{:26} {:10.2f} {:10.2f} {:12.2f}".format(phase.name, *(size / GIB for size in figures))
            lines.append(f"{row}  {'#' * max(1, round(_BAR * device.reserved / most))}")
        peak = self.highest.device
        where = f"{peak.running}, in {peak.module}" if peak.module else peak.running
        lines += ["", f"The peak is in {self.highest.name} ({where}):"]
        most = max(peak.parts.values())
        for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]):
            if size >= 0.01 * peak.requested:
                lines.append(f"  {name:18} {size / GIB:8.2f}  {'#' * max(1, round(_WIDTH * size / most))}")
        return [*lines, "", *self._costs(), *self.notes, self.verdict]

    def _costs(self) -> list[str]:
        lines = []
        for phase in self.phases:
            if phase.flops is not None:
                gpu, time = self.hardware.gpu, ""
                if gpu and phase.seconds:
                    time = f"; estimate: {phase.seconds:.2f} s on {gpu.name}, by its peak rates"
                lines.append(f"{phase.name}: {phase.flops / 1e12:.1f} TFLOP on each GPU{time}")
        if self.host_bytes:
            lines.append(
                f"host memory of a node of {self.hardware.processes}: {self.host_bytes / GIB:.2f} GiB, beside Python's own"
            )
        return lines

    @property
    def verdict(self) -> str:
        """In words, whether the training fits, and how much memory is missing if not."""
        needs = f"{self.highest.device.reserved / GIB:.2f} GiB"
        hardware = self.hardware
        each = "a GPU" if hardware.gpus == 1 else f"each of {hardware.gpus} GPUs"
        excess = self.host_bytes - hardware.host_capacity if hardware.host_capacity else 0
        if excess > 0:
            node = f"a node needs {self.host_bytes / GIB:.2f} GiB of host memory"
            return f"does not fit: {node}, {excess / GIB:.2f} more than there are; {each} needs {needs}"
        if hardware.capacity is None:
            return f"{each} needs {needs}, beside what its driver takes; --device-memory 24GiB says whether it fits"
        difference = abs(hardware.capacity - self.highest.device.reserved) / GIB
        if self.fits:
            return f"fits: {each} needs {needs} of {hardware.capacity / GIB:.2f}, beside what its driver takes"
        return f"does not fit: {each} needs {needs}, {difference:.2f} GiB more than there are"
