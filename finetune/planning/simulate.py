"""The memory that a training will take: the phases of its run, on the simulated accelerator."""

import contextlib
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from finetune.data.loader import Sample
from finetune.engine.companion import build_companion
from finetune.engine.ema import WeightAverage
from finetune.engine.generate import Request, generate
from finetune.engine.optimizers.low_bit import host_seconds
from finetune.engine.parts import evaluating
from finetune.engine.precision import DTYPES
from finetune.engine.step import StepState, run_step
from finetune.engine.weights.exporters.exporter import gathered
from finetune.engine.weights.loading import plain_name
from finetune.engine.weights.staging import staged_bytes
from finetune.models.batch import Batch
from finetune.models.encoder import Encoder
from finetune.models.family import Family
from finetune.planning.accelerator import UPDATE, Accelerator
from finetune.planning.device import simulated_runtime, works_with_this_torch
from finetune.planning.gpus import Hardware
from finetune.planning.kernels import HOPPER_WORKSPACE, WORKSPACE
from finetune.planning.plan import Phase, Plan
from finetune.planning.timeline import Pictured, Timeline, plot_timelines
from finetune.planning.trace import Trace
from finetune.planning.weightless import WeightlessFolder, ZeroWeights
from finetune.preparation.columns import further_columns
from finetune.recipe import Bucket, Recipe
from finetune.recipe.prompts import ResolvedPrompt, validation_prompts
from finetune.recipe.rules import streams
from finetune.runtime.gpus import CONTEXT
from finetune.runtime.logging import quietly
from finetune.runtime.progress import PATIENCE, ProgressLine
from finetune.training.job import build_state, is_background

# Micro-batches of each step. The first allocates the optimizer's state; later steps behave like the second.
STEPS = (1, 2)
_DENOISING_STEPS = 2  # later steps behave like the second
_STEPS_OF_TWO = 4  # with two transformers: enough to reach the second one
_NOTICEABLE = 0.1  # share of a step from which host time is told
_MOMENTS = 600  # of a phase in the picture
_RUNNING = {  # what is running when a phase begins that encodes nothing
    "load": "load",
    "step": "inputs",
    "validation": "generating",
    "export": "gathering",
}


class _FakeToNumpy(TorchFunctionMode):
    """Converts fake tensors to arrays of zeros where numpy is asked for: generated videos are black."""

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        if function is Tensor.numpy and isinstance(arguments[0], FakeTensor):
            return np.zeros(arguments[0].shape, np.float32)
        return function(*arguments, **(keywords or {}))


class Simulation:
    """Takes rank 0 of a simulated process group through the phases of a recipe's run.

    The simulated device stays registered with torch, so a process that has simulated must not train.
    """

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        hardware: Hardware,
        temporaries: bool = True,
        line: ProgressLine | None = None,
    ) -> None:
        """
        Args:
            line: shows the phases as they begin.
            temporaries: whether to count memory beside the tensors themselves: what kernels allocate for themselves, and
                what page-locked host memory is rounded up to.
        """
        self.recipe, self.family, self.hardware, self._line = recipe, family, hardware, line
        self.streams = streams(recipe.memory, recipe.train.method, hardware.gpus)
        self.device = Trace(hardware.capacity, recipe.memory.expandable_segments)
        self.host = Trace(locked=self._locked() if temporaries else frozenset())
        workspace = HOPPER_WORKSPACE if hardware.gpu and hardware.gpu.is_hopper else WORKSPACE
        self.accelerator = Accelerator(self.device, self.host, temporaries, workspace)
        self._checkpoint: Tensor | None = None  # host memory that checkpoints are copied to
        self.phases: list[Phase] = []
        self.notes = list(family.folder.origin)
        self.timelines: dict[str, Timeline] = {}

    def encoding(self, buckets: list[Bucket]) -> None:
        """Encode a caption, and a clip of each bucket: text encoders, then the VAE, on the device like in `prepare`."""
        weightless = self.family.on(WeightlessFolder(self.family.folder.path, self.accelerator))
        device, dtype = self.runtime.device, DTYPES[self.recipe.train.precision]
        on_host = self.recipe.memory.text_encoder == "cpu"
        text, *others = sorted(weightless.encoders(dtype, self.recipe.vae), key=lambda encoder: encoder.kind != "text")
        missing = [
            name for name in weightless.text_components if not any((weightless.folder.path / name).glob("*config.json"))
        ]
        if missing:
            self.notes.append(f"encoding captions is not in it: {weightless.folder.path} has no {', '.join(missing)}")
        else:
            with self._phase("encode text"):
                encode = text.load(torch.device("cpu") if on_host else device.torch_device)
                encode(*_contents(text, buckets[0]))
                del encode
        for encoder in others:
            if further_columns([encoder]):
                self.notes.append(f"encoding of {encoder.kind} is not in it")
                continue
            for bucket in buckets:
                with self._phase(f"encode {encoder.kind}", bucket), _FakeToNumpy():
                    encode = encoder.load(device.torch_device)
                    encode(*_contents(encoder, bucket))
                    del encode

    def training(self, buckets: list[Bucket], other: Family | None = None) -> StepState:
        """Build the training, and take steps of each bucket: as many as it takes until memory repeats.

        Args:
            other: the family opened on the other transformer that samples are generated with, if there is one.
        """
        batches = {bucket: example_batch(self.recipe, self.family, bucket) for bucket in buckets}
        train = self.recipe.train
        count = train.global_batch_size // (self.runtime.data.size * train.micro_batch_size)
        with self._phase("load"):
            state = build_state(self.recipe, self.runtime, self.family, ZeroWeights(self.family))
            self._register_hooks(state)
            if other is not None:
                self._build_companion(state, other)
        for bucket, batch in batches.items():
            with self._phase("step", bucket):
                costs = []
                for step, most in enumerate(STEPS):
                    self.accelerator.reset_cost()
                    run_step(state, step, [batch] * min(count, most))
                    self._name_state(state)
                    costs.append(self.accelerator.cost)
                if self._checkpoint is None and is_background(self.recipe):  # from the first checkpoint on
                    values = (each.values() for each in state.optimizer.state.values())
                    more = [part.state_dict() for part in state.parts[2:]]  # besides weights and optimizer
                    size = staged_bytes([state.parameters, *map(list, values), more])
                    self._checkpoint = self.runtime.device.pinned(size)
            self._note_waits()
            one, two = costs
            cost = two.repeated(one, count) if count > 1 else two
            # Streamed blocks are copied ahead, and FSDP prefetches offloaded shards, but only with two ranks and more.
            # An offloaded optimizer's copies come after the backward pass.
            overlaps = self.hardware.gpus > 1 or self.streams or not self.recipe.memory.offload
            overlaps = overlaps and self.recipe.optimizer.offload == "none"
            self.phases[-1] = self.phases[-1].with_cost(cost, self.hardware.gpu, overlaps)
        self._note_host_time(len(state.parameters))
        return state

    def _build_companion(self, state: StepState, other: Family) -> None:
        settings = self.recipe.train, self.recipe.adapter, self.recipe.memory, self.runtime
        state.companion = build_companion(state.transformer, other, ZeroWeights(other), *settings)
        self.accelerator.name(state.companion.transformer.parameters(), "frozen weights")
        self.accelerator.name(state.companion.host, "transformers not in use")

    def _note_host_time(self, parameters: int) -> None:
        """Say so if torchao's updates would take more than a tenth of a step: of the bucket with the shortest one."""
        seconds, phase = min(
            ((phase.seconds or math.inf, phase) for phase in self.phases if phase.kind == "step"), key=itemgetter(0)
        )
        if self.recipe.optimizer.offload != "none" or (self.recipe.memory.offload and not self.streams):
            return  # updates are made on the CPU: their time is in the step's
        updates = host_seconds(self.recipe.optimizer, self.recipe.train.weights, parameters)
        if updates > _NOTICEABLE * seconds:
            self.notes.append(
                f"updates of {parameters} parameters, one by one, take about {updates:.1f} s of host time beside the "
                f'{seconds:.2f} s of {phase.name}; a larger batch shares them, and optimizer.name = "adamw" with '
                'train.weights = "float32" makes them at once'
            )

    def validation(self, state: StepState, prompts: Sequence[ResolvedPrompt]) -> None:
        """Generate the largest prompt, with guidance if any of that size has it, by the family's pipeline around the transformer
        in training.
        """
        prompt = max(prompts, key=lambda each: (self.family.tokens(each.shape), _is_guided(each)))
        prompt = prompt.model_copy(update={"steps": _STEPS_OF_TWO if state.companion else _DENOISING_STEPS})
        dtype = DTYPES[self.recipe.train.precision]
        encoded = self.family.example(prompt.shape, dtype)
        image = np.zeros((prompt.shape.height, prompt.shape.width, 3), np.uint8)
        images = [image] * (self.family.takes_image + self.family.last_image)
        family, idle = state.family, example_batch(self.recipe, self.family, prompt.shape)
        state.family = family.on(WeightlessFolder(family.folder.path, self.accelerator))
        with self._phase("validation", prompt.shape), _FakeToNumpy():
            request = Request(prompt, 0, encoded, encoded["text"], images)
            generate(state, [request], idle, self.recipe.validation.tiling, dtype, lambda *_: None)
        state.family = family

    def export(self, state: StepState) -> None:
        """Gather the trained weights."""
        with self._phase("export"), evaluating(state.parts, "export"):
            gathered(state.transformer, trained_only=self.recipe.train.method != "full")

    def plan(self) -> Plan:
        """The phases that have been simulated."""
        return Plan(self.hardware, self.phases, self.notes)

    @contextlib.contextmanager
    def running(self) -> Iterator["Simulation"]:
        """The context in which phases are simulated. Raises UserError if this version of torch cannot be simulated on."""
        hook = sys.excepthook
        with works_with_this_torch():
            self.runtime = simulated_runtime(self.hardware, self.device, self.recipe.train.float8)
            try:
                # Autograd runs in one thread, so that simulations repeat exactly; compiled blocks run eagerly.
                single = torch.autograd.set_multithreading_enabled(False)
                with self.accelerator, single, torch.compiler.set_stance("force_eager"):
                    yield self
            finally:
                dist.destroy_process_group()
                sys.excepthook = hook  # `init_process_group` replaces it

    @contextlib.contextmanager
    def _phase(self, kind: str, shape: Bucket | None = None) -> Iterator[None]:
        if self._line:
            self._line.update(len(self.phases), f"{kind} {shape}" if shape else kind)
        self.accelerator.running(_RUNNING.get(kind, "encoding"))
        self.device.begin()
        self.host.begin()
        yield
        self.phases.append(Phase(kind, shape, self.device.peak(), self.host.peak()))
        self.timelines[self.phases[-1].name] = self.device.timeline(_MOMENTS)
        if kind.startswith("encode"):  # as `prepare` does
            gc.collect()
            self.runtime.device.empty_cache()

    def _locked(self) -> frozenset[str]:
        """Categories in host memory that torch allocates page-locked, for copies from and to a GPU."""
        memory = self.recipe.memory
        sharded = {"frozen weights", "trained weights", "gradients"} if memory.offload and not self.streams else set()
        return frozenset(sharded | ({"activations"} if memory.offload_activations else set()))

    def _register_hooks(self, state: StepState) -> None:
        """Name weights and gradients, and set what is running, by hooks on modules and optimizer."""
        accelerator = self.accelerator
        parameters = list(state.transformer.parameters())
        accelerator.name((p for p in parameters if not p.requires_grad), "frozen weights")
        accelerator.name((p for p in parameters if p.requires_grad), "trained weights")
        if state.host_gradients:
            accelerator.name(state.host_gradients.held.values(), "gradients")
        for part in state.parts:
            if isinstance(part, WeightAverage):
                accelerator.name(part.values.values(), "average")

        def before_update(*_: object) -> None:
            accelerator.name((p.grad for p in state.parameters if p.grad is not None), "gradients")
            accelerator.running(UPDATE)

        def running(what: str) -> None:
            if torch.is_grad_enabled():  # in training
                accelerator.running(what)

        state.transformer.register_forward_pre_hook(lambda *_: running("activations"))
        state.transformer.register_forward_hook(lambda *_: running("backward pass"))
        state.optimizer.register_step_pre_hook(before_update)
        for name, module in state.transformer.named_modules():
            name = plain_name(name)
            if name.count(".") <= 2:
                module.register_forward_pre_hook(lambda *_, name=name: accelerator.module_called(name))

    def _note_waits(self) -> None:
        """Note where the code of a family, or of its model, makes the host wait for the GPU in the last step."""
        # The engine waits where it must: for gradients that FSDP2 sends to the host.
        ours = str(Path(__file__).parents[1])
        for wait in sorted(set(self.accelerator.waits)):
            note = f"each step makes the host wait for the GPU: {wait}"
            if ours not in wait and note not in self.notes:
                self.notes.append(note)

    def _name_state(self, state: StepState) -> None:
        values = (value for each in state.optimizer.state.values() for value in each.values())
        self.accelerator.name((value for value in values if isinstance(value, Tensor)), "optimizer state")
        self.accelerator.running("inputs")


def simulate(
    recipe: Recipe, family: Family, buckets: list[Bucket], hardware: Hardware, temporaries: bool = True
) -> Plan:
    """Simulate loading and steps alone, and print nothing; see `Simulation`."""
    with quietly(), Simulation(recipe, family, hardware, temporaries).running() as simulation:
        simulation.training(buckets)
    return simulation.plan()


def simulate_all(
    recipe: Recipe,
    family: Family,
    buckets: list[Bucket],
    hardware: Hardware,
    picture: Path | None = None,
) -> Plan:
    """Simulate every phase of a run, in order.

    Args:
        picture: a PNG to draw the timeline of memory in.
    """
    prompts = validation_prompts(recipe.validation, recipe.data.sample_shape)
    phases = sum(encoder.kind != "text" for encoder in family.encoders(DTYPES[recipe.train.precision], recipe.vae))
    total = 1 + (phases + 1) * len(buckets) + 1 + bool(prompts) + 1
    line = ProgressLine("planning: phase", total, patience=PATIENCE)
    with line, Simulation(recipe, family, hardware, line=line).running() as simulation:
        simulation.encoding(buckets)
        state = simulation.training(buckets, family.of_other_expert() if prompts else None)
        if prompts:
            simulation.validation(state, prompts)
        simulation.export(state)
    if picture is not None:
        plot_timelines(simulation.timelines, _pictured(simulation, buckets), picture)
    return simulation.plan()


def _pictured(simulation: Simulation, buckets: Sequence[Bucket]) -> Pictured:
    """What the picture of a plan says of it."""
    recipe, hardware = simulation.recipe, simulation.hardware
    method = "LoRA" if recipe.train.method == "lora" else recipe.train.method
    gpus = "1 GPU" if hardware.gpus == 1 else f"{hardware.gpus} GPUs"
    title = f"{simulation.family.title}, {method}, {', '.join(map(str, buckets))}, {gpus}"
    named = hardware.gpu is not None and hardware.capacity == hardware.gpu.memory - CONTEXT
    gpu = hardware.gpu.name if named and hardware.gpu else "the GPU"
    peaks = {phase.name: phase.device.reserved for phase in simulation.phases}
    return Pictured(title, peaks, hardware.capacity, gpu)


def _contents(encoder: Encoder, bucket: Bucket) -> list[Any]:
    """What an encoder takes of a clip in a bucket: black frames and any caption."""
    frames = np.zeros((*bucket, 3), np.uint8)
    contents = {"caption": "a caption", "video": frames, "first_frame": frames[0], "last_frame": frames[-1]}
    return [contents[name] for name in encoder.sources]


def _is_guided(prompt: ResolvedPrompt) -> tuple[bool, bool]:
    """Whether the transformer is given prompt and negative prompt at once: by true guidance, by guidance (unset: the pipeline's
    default, which guides).
    """
    return (prompt.true_guidance or 1) > 1, prompt.guidance is None or prompt.guidance > 1


def cache_bytes(family: Family, bucket: Bucket, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes on disk of an encoded clip and an encoded caption."""
    encoded = family.example(bucket, dtype)
    sizes = {kind: sum(tensor.nbytes for tensor in tensors.values()) for kind, tensors in encoded.items()}
    return sum(size for kind, size in sizes.items() if kind != "text"), sizes["text"]


def largest(family: Family, buckets: list[Bucket]) -> Bucket:
    """The bucket with most tokens."""
    return max(buckets, key=family.tokens)


def example_batch(recipe: Recipe, family: Family, bucket: Bucket) -> Batch:
    """A micro-batch of a bucket: zeros with noise, on the CPU."""
    dtype = DTYPES[recipe.train.precision]
    encoded = family.example(bucket, dtype)
    blank = None
    if recipe.objective.guidance_target is not None:  # unlike the text, so that it goes to the device, too
        blank = {name: torch.ones_like(tensor) for name, tensor in encoded["text"].items()}
    size, generator = recipe.train.micro_batch_size, torch.Generator().manual_seed(0)
    samples = [Sample(encoded, bucket, 25.0, generator, (place, size), blank=blank) for place in range(size)]
    return family.batch(samples, family.training_objective(recipe.objective))
