"""How much memory a training will take: its own `build` and `step`, on an accelerator that is simulated."""

import torch
import torch.distributed as dist
from torch import Tensor

from finetune.data.loader import Sample
from finetune.engine.precision import DTYPES
from finetune.engine.step import StepState, run_step
from finetune.job import build_state
from finetune.memory.accelerator import Accelerator, simulated_runtime
from finetune.memory.report import Phase, Plan
from finetune.memory.trace import Trace
from finetune.models.family import Batch, Family
from finetune.recipe import Bucket, Recipe

STEPS = (1, 2)  # micro-batches of each: the optimizer's state comes with the first step; no third is unlike the second


class _Zeros:
    """In the place of a transformer's weights: shapes of its own, numbers of none."""

    def __init__(self, family: Family) -> None:
        self.shapes = {name: tensor.shape for name, tensor in family.empty_transformer().state_dict().items()}

    def names(self) -> set[str]:
        return set(self.shapes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        shape = self.shapes[name]
        return torch.zeros(()).expand([stop - start, *shape[1:]] if shape else shape)


def simulate(
    recipe: Recipe,
    family: Family,
    buckets: list[Bucket],
    gpus: int,
    capacity: int | None = None,
    inside: bool = True,
) -> Plan:
    """Build the recipe's training and take steps of each bucket, on rank 0 of `gpus` simulated ones.

    A process simulates once: the simulated device stays known to torch.

    Args:
        capacity: bytes of a GPU's memory; None for any number.
        inside: whether to count what kernels allocate beside their results.
    """
    batches = {bucket: example_batch(recipe, family, bucket) for bucket in buckets}
    count = recipe.train.global_batch_size // (gpus * recipe.train.micro_batch_size)
    weights, phases = _Zeros(family), []
    device, host = Trace(capacity), Trace()
    runtime = simulated_runtime(gpus, device, capacity, recipe.train.float8)
    accelerator = Accelerator(device, host, inside)
    # One thread for autograd, so that the same happens every time; compiled code is run as it is written.
    with accelerator, torch.autograd.set_multithreading_enabled(False), torch.compiler.set_stance("force_eager"):
        state = build_state(recipe, runtime, family, weights)
        _follow(state, accelerator)
        phases.append(Phase("load", device.peak(), host.peak()))
        for bucket, batch in batches.items():
            device.begin()
            host.begin()
            for step, most in enumerate(STEPS):
                run_step(state, step, [batch] * min(count, most))
                _name_state(state, accelerator)
            phases.append(Phase(f"step {bucket}", device.peak(), host.peak()))
    dist.destroy_process_group()
    return Plan(gpus, capacity, phases)


def largest(family: Family, buckets: list[Bucket]) -> Bucket:
    """The bucket with most tokens."""
    return max(buckets, key=family.tokens)


def example_batch(recipe: Recipe, family: Family, bucket: Bucket) -> Batch:
    """A rank's micro-batch of a bucket, in zeros and noise."""
    dtype = DTYPES[recipe.train.precision]
    moments, text = family.example(bucket, dtype)
    size, generator = recipe.train.micro_batch_size, torch.Generator().manual_seed(0)
    samples = [Sample(moments, text, bucket, 25.0, generator, (place, size)) for place in range(size)]
    return family.batch(samples, family.objective(recipe.objective))


def _follow(state: StepState, accelerator: Accelerator) -> None:
    """Name weights and gradients, and note what is running, by the hooks that torch has for it."""
    parameters = list(state.transformer.parameters())
    accelerator.name((p for p in parameters if not p.requires_grad), "frozen weights")
    accelerator.name((p for p in parameters if p.requires_grad), "trained weights")

    def before_update(*_: object) -> None:
        accelerator.name((p.grad for p in state.parameters if p.grad is not None), "gradients")
        accelerator.running("update")

    state.transformer.register_forward_pre_hook(lambda *_: accelerator.running("activations"))
    state.transformer.register_forward_hook(lambda *_: accelerator.running("backward pass"))
    state.optimizer.register_step_pre_hook(before_update)


def _name_state(state: StepState, accelerator: Accelerator) -> None:
    values = (value for each in state.optimizer.state.values() for value in each.values())
    accelerator.name((value for value in values if isinstance(value, Tensor)), "optimizer state")
    accelerator.running("inputs")
