"""Settings of a recipe that contradict each other, or that the machine cannot do."""

import importlib.util
import os
import shutil
from collections.abc import Iterator

import torch
from torch.nn.attention import list_flash_attention_impls

from finetune.engine.optimizers.extra import missing_library
from finetune.engine.weights.exporters import export_problems
from finetune.models.adapters import ADAPTERS
from finetune.models.family import Family
from finetune.recipe import Recipe
from finetune.recipe.optimizers import AdamW, LowBitAdamW
from finetune.recipe.rules import saver_problems
from finetune.recipe.schema import is_set
from finetune.runtime.device import Device, why_no_accelerator
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.units import counted
from finetune.tracking.trackers import tracker_problems

_LARGEST_ON_CPU = 100_000_000  # parameters
# Kernels of half precision, the major compute capabilities that have them, and those in words
# (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; torch/nn/attention/_fa3.py and _fa4.py).
_CAPABILITIES = {
    "flash": (range(8, 100), "8.0 and above"),
    "cudnn": (range(8, 100), "8.0 and above"),
    "fa3": (range(9, 10), "9.0"),
    "fa4": (range(9, 11), "9.0 to 10.3"),
}
_PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface"}  # which torch imports for them
_FLOAT8_EVERYWHERE = (2, 13)  # torch whose Triton has float8 e4m3 below compute capability 8.9

_HIGHEST_RATE = 0.5  # that is not refused
_OTHER_RATES = {  # the highest one, and what it multiplies
    "prodigy": (100.0, "the rate that prodigy estimates", "1 is usual"),
    "adafactor": (0.5, "each weight's own size, and is how far it moves in every step", "1e-3 to 1e-2 are usual"),
}


def check_recipe(recipe: Recipe, data_ranks: int) -> list[Problem]:
    """Combinations of settings that cannot work on so many data ranks: one a GPU, as long as none share samples."""
    return [
        *_batch_problems(recipe, data_ranks),
        *saver_problems(recipe, data_ranks),
        *_setting_problems(recipe),
    ]


def check_device(recipe: Recipe, device: Device) -> list[Problem]:
    """What the device, or the machine around it, cannot do."""
    if device.is_cpu:  # where a recipe is checked that is for GPUs elsewhere
        return []
    return [
        *check_gpu(recipe, device.name, device.has_float8),
        *_attention_problems(recipe, device),
        *_kernel_problems(recipe, device),
    ]


def check_cpu(recipe: Recipe) -> list[Problem]:
    """What a training cannot do on a CPU."""
    kernel = recipe.memory.attention
    if kernel in ("auto", "math", "flash"):  # it has a flash kernel of its own
        return []
    return [Problem(f'"{kernel}" is a kernel of GPUs, and this is a CPU', "memory.attention", 'set it to "auto"')]


def _attention_problems(recipe: Recipe, device: Device) -> Iterator[Problem]:
    """Why this GPU, or the packages that are installed, cannot compute attention as the recipe says."""
    kernel, key, instead = recipe.memory.attention, "memory.attention", 'set it to "auto"'
    if kernel in ("auto", "math"):
        return
    if device.capability is None:
        yield Problem(f'"{kernel}" is a kernel of NVIDIA GPUs, and this is {device.name}', key, instead)
        return
    yield from attention_problems(recipe, device.name, device.capability)
    if kernel in _PACKAGES:
        module, implementation = _PACKAGES[kernel], kernel.upper()
        if implementation not in list_flash_attention_impls():
            yield Problem(f"torch {torch.__version__} has no {implementation}", key, instead)
        if not _is_installed(module):
            cure = f"install FlashAttention {kernel[-1]} (https://github.com/Dao-AILab/flash-attention), or {instead}"
            yield Problem(f"there is no Python module {module}", key, cure)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of a package that the module is in
        return False


def attention_problems(recipe: Recipe, name: str, capability: tuple[int, int]) -> Iterator[Problem]:
    """Why an NVIDIA GPU, here or not, cannot compute attention as the recipe says."""
    kernel, key, instead = recipe.memory.attention, "memory.attention", 'set it to "efficient"'
    if kernel in _CAPABILITIES:
        majors, words = _CAPABILITIES[kernel]
        if capability[0] not in majors:
            has = ".".join(map(str, capability))
            yield Problem(f'"{kernel}" needs compute capability {words}, and {name} has {has}', key, instead)
        if recipe.train.precision == "float32":
            cure = f'{instead}, or train.precision = "bf16"'
            yield Problem(f'"{kernel}" does not compute in float32', key, cure)


def _kernel_problems(recipe: Recipe, device: Device) -> Iterator[Problem]:
    """What is compiled for the GPU: the blocks with memory.compile, and the updates of torchao's optimizers."""
    compiled = [] if not recipe.memory.compile else [("memory.compile", "set it to false")]
    if isinstance(recipe.optimizer, LowBitAdamW):
        compiled.append(("optimizer.name", 'set it to "adamw"'))
    elif isinstance(recipe.optimizer, AdamW) and recipe.train.weights == "bf16":
        compiled.append(("train.weights", 'set it to "float32"'))
    if compiled and not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        key, instead = compiled[0]
        yield Problem("kernels are compiled for this, and there is no C compiler", key, f"install gcc, or {instead}")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if device.has_float8 or version >= _FLOAT8_EVERYWHERE:
        return
    for key, wanted in (
        ("optimizer.name", recipe.optimizer.name == "adamw_fp8"),
        ("memory.low_bit", recipe.memory.low_bit == "float8" and recipe.memory.compile),
    ):
        if wanted:
            yield Problem(
                f"kernels with float8 on {device.name} need torch 2.13, and this is {torch.__version__}",
                key,
                "install a newer torch, or choose 8 bits: " + ('"adamw_8bit"' if key[0] == "o" else '"int8"'),
            )


def refuse_large_model(family: Family) -> None:
    """Raise UserError if a model is too large for a CPU: where a GPU was meant, an hour would show it, not an error."""
    size = sum(parameter.numel() for parameter in family.empty_transformer().parameters())
    if size > _LARGEST_ON_CPU:
        raise UserError(
            f"no GPU: {why_no_accelerator()}; {family.title} has {size / 1e6:,.0f} million parameters",
            "mend the installation of torch or of the driver, or train on the CPU all the same with --cpu",
        )


def check_gpu(recipe: Recipe, name: str, has_float8: bool) -> list[Problem]:
    """What a GPU, here or not, cannot do."""
    if recipe.train.float8 and not has_float8:
        return [Problem(f"{name} has no float8 arithmetic", "train.float8", "set it to false")]
    return []


def _batch_problems(recipe: Recipe, data_ranks: int) -> Iterator[Problem]:
    train = recipe.train
    share = data_ranks * train.micro_batch_size
    if train.global_batch_size % share:
        nearest = max(1, round(train.global_batch_size / share)) * share
        yield Problem(
            f"a global batch of {train.global_batch_size} cannot be split over {counted(data_ranks, 'rank')} "
            f"taking {train.micro_batch_size} at a time",
            "train.global_batch_size",
            f"set train.global_batch_size = {nearest}",
        )


def _setting_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.schedule.name == "constant" and recipe.schedule.warmup_steps:
        yield Problem(
            '"constant" has no warm-up', "schedule.warmup_steps", 'set schedule.name = "constant_with_warmup"'
        )
    if recipe.schedule.warmup_steps > recipe.train.steps:
        yield Problem(
            f"{counted(recipe.schedule.warmup_steps, 'warm-up step')}, but only {counted(recipe.train.steps, 'step')} in all",
            "schedule.warmup_steps",
            f"set it to at most {recipe.train.steps}",
        )
    if other := _OTHER_RATES.get(recipe.optimizer.name):
        highest, of, usual = other
        if recipe.optimizer.lr > highest:
            yield Problem(f"a learning rate of {recipe.optimizer.lr:g} multiplies {of}", "optimizer.lr", usual)
    elif recipe.optimizer.lr > _HIGHEST_RATE:
        what = f"a learning rate of {recipe.optimizer.lr:g} moves each weight by about that much in every step"
        yield Problem(what, "optimizer.lr", "1e-5 to 1e-3 are usual")
    if problem := missing_library(recipe.optimizer):
        yield problem
    for name in ADAPTERS:
        settings = getattr(recipe, name)
        if name != recipe.train.method and settings != type(settings)():
            yield Problem(
                f'[{name}] has no effect with method = "{recipe.train.method}"',
                name,
                f'remove the table, or set train.method = "{name}"',
            )
    if recipe.validation.heldout and recipe.validation.heldout_clips:
        yield Problem(
            "held-out clips are both named and taken out of data.path",
            "validation.heldout_clips",
            "remove it, or validation.heldout",
        )
    yield from _objective_problems(recipe)
    if recipe.ema.decay is not None and recipe.ema.every > recipe.train.steps:
        what = f"there would be no average: its first update is after step {recipe.ema.every} of {recipe.train.steps}"
        yield Problem(what, "ema.every", f"set it to at most {recipe.train.steps}")
    if recipe.objective.sigma_min >= recipe.objective.sigma_max:
        yield Problem("sigma_min is not below sigma_max", "objective.sigma_min", "lower it")
    ranges = [recipe.objective.sigma_range, *recipe.objective.expert_ranges.values()]
    for sigma_range in (each for each in ranges if each and each[0] >= each[1]):
        low, high = sigma_range
        what = f"in the range {sigma_range}, {low} is not below {high}"
        yield Problem(what, "objective.sigma_range", "name the lower limit first, and a higher one second")
    for key, effective, cure in _needs(recipe):
        if is_set(recipe, key) and not effective:
            yield Problem("this key has no effect here", key, f"remove it, or {cure}")
    yield from export_problems(recipe.train.method, recipe.export.formats, recipe.export.precision, recipe.adapter)
    yield from tracker_problems(recipe.tracking.trackers)


def _objective_problems(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    if objective.sigma_table is not None and objective.sigma_sampling is not None:
        what = f'sigma has two distributions: its own table, and "{objective.sigma_sampling}"'
        yield Problem(what, "objective.sigma_table", "remove it, or objective.sigma_sampling")
    if objective.guidance_target is not None and recipe.train.method != "lora":
        what = "the target needs the prediction of the frozen base, which is there as long as an adapter is trained"
        yield Problem(what, "objective.guidance_target", 'remove it, or set train.method = "lora"')


def _needs(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """(key, whether it has an effect, what it needs) of keys that depend on another."""
    sampling, schedule = recipe.objective.sigma_sampling, recipe.schedule.name
    is_normal = sampling == "logit_normal" or (sampling is None and recipe.objective.sigma_table is None)
    for key in ("objective.logit_mean", "objective.logit_std"):
        yield key, is_normal, 'set objective.sigma_sampling = "logit_normal"'
    yield "objective.mode_scale", sampling == "mode", 'set objective.sigma_sampling = "mode"'
    yield "objective.snr_gamma", recipe.objective.weighting == "min_snr", 'set objective.weighting = "min_snr"'
    yield "objective.loss_delta", recipe.objective.loss != "mse", 'set objective.loss = "huber" or "smooth_l1"'
    yield "schedule.cycles", schedule == "cosine_with_restarts", 'set schedule.name = "cosine_with_restarts"'
    yield "schedule.power", schedule == "polynomial", 'set schedule.name = "polynomial"'
    yield "data.windows", recipe.data.window == "random", 'set data.window = "random"'
    yield "data.overlap", recipe.data.window == "all", 'set data.window = "all"'
    for key in ("ema.warmup", "ema.every", "ema.device", "ema.use"):
        yield key, recipe.ema.decay is not None, "set ema.decay = 0.999"
    validation = recipe.validation
    heldout = bool(validation.heldout or validation.heldout_clips)
    for key in ("validation.patience", "checkpoint.keep_best"):
        yield (
            key,
            heldout and validation.every is not None,
            "measure a held-out loss: set validation.every and heldout_clips",
        )
    for key in ("validation.every", "validation.sigmas"):
        yield key, heldout, "set validation.heldout_clips, or validation.heldout to a dataset"
    prompts = bool(validation.prompts or validation.prompts_file)
    sampled = ("samples_every", "samples_at_start", "samples_at_end", "tiling")
    for key in (f"validation.{name}" for name in sampled):
        yield key, prompts, "add [[validation.prompts]]"
    for key in ("tracking.project", "tracking.name"):
        used = {"wandb", "mlflow", "trackio"} & set(recipe.tracking.trackers)
        yield key, bool(used), 'add "wandb", "mlflow" or "trackio" to tracking.trackers'
