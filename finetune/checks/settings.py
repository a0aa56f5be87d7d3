"""Settings of a recipe that contradict each other, or that the machine cannot do."""

from collections.abc import Iterator
from importlib.util import find_spec

from finetune.engine.layout import streams
from finetune.recipe import Recipe
from finetune.recipe.schema import Lora
from finetune.runtime.device import Device
from finetune.runtime.errors import Problem


def check_recipe(recipe: Recipe, world_size: int) -> list[Problem]:
    """Combinations of settings that cannot work on `world_size` ranks."""
    return [
        *_batch_problems(recipe, world_size),
        *_layout_problems(recipe, world_size),
        *_in_backward_problems(recipe, world_size),
        *_setting_problems(recipe),
    ]


def check_device(recipe: Recipe, device: Device) -> list[Problem]:
    """What the device cannot do."""
    return [] if device.is_cpu else check_gpu(recipe, device.name, device.has_float8)


def check_gpu(recipe: Recipe, name: str, has_float8: bool) -> list[Problem]:
    """What a GPU, here or not, cannot do."""
    if recipe.train.float8 and not has_float8:
        return [Problem(f"{name} has no float8 arithmetic", "train.float8", "set it to false")]
    return []


def _batch_problems(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    train = recipe.train
    share = world_size * train.micro_batch_size
    if train.global_batch_size % share:
        nearest = max(1, round(train.global_batch_size / share)) * share
        yield Problem(
            f"a global batch of {train.global_batch_size} cannot be split over {world_size} rank(s) taking "
            f"{train.micro_batch_size} at a time",
            "train.global_batch_size",
            f"set train.global_batch_size = {nearest}",
        )


def _layout_problems(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    size = recipe.memory.shard_size
    if recipe.memory.offload and recipe.memory.layout == "replicate" and recipe.train.method == "full":
        yield Problem(
            "replicated weights that are trained stay on the device, and cannot be in host memory",
            "memory.layout",
            'set it to "shard", or memory.offload = false',
        )
    if recipe.memory.resident_blocks and not streams(recipe.memory, recipe.train.method, world_size):
        missing = [] if recipe.memory.offload else ["memory.offload = true"]
        missing += ['train.method = "lora"'] if recipe.train.method == "full" else []
        missing += ['memory.layout = "replicate"'] if world_size > 1 and recipe.memory.layout != "replicate" else []
        yield Problem(
            "this key has no effect here: blocks take turns on the device only with LoRA, on one GPU or replicated",
            "memory.resident_blocks",
            f"remove it, or set {', '.join(missing)}",
        )
    if recipe.memory.layout == "hybrid" and size and world_size % size:
        near = max(n for n in range(1, size) if world_size % n == 0)
        cure = f"set it to {near}" if near > 1 else 'remove it, and set memory.layout = "shard"'
        yield Problem(f"{world_size} rank(s) cannot be divided into groups of {size}", "memory.shard_size", cure)


def _in_backward_problems(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """An update in the backward pass sees one gradient at a time, of one micro-batch."""
    train, key = recipe.train, "optimizer.in_backward"
    if not recipe.optimizer.in_backward:
        return
    if train.method == "lora":
        yield Problem("an adapter's gradients are small; nothing is saved", key, "remove it")
    if train.max_grad_norm != "none":
        yield Problem(
            "the norm of all gradients is not known before the last one", key, 'set train.max_grad_norm = "none"'
        )
    if train.global_batch_size > world_size * train.micro_batch_size:
        share = train.global_batch_size // world_size
        yield Problem("gradients cannot be accumulated", key, f"set train.micro_batch_size = {share}, or remove it")
    if recipe.memory.offload:
        yield Problem("offloaded gradients are in host memory already, and the update is made there", key, "remove it")


def _setting_problems(recipe: Recipe) -> Iterator[Problem]:
    if recipe.schedule.name == "constant" and recipe.schedule.warmup_steps:
        yield Problem(
            '"constant" has no warm-up', "schedule.warmup_steps", 'set schedule.name = "constant_with_warmup"'
        )
    if recipe.schedule.warmup_steps > recipe.train.steps:
        yield Problem(
            f"{recipe.schedule.warmup_steps} warm-up steps, but only {recipe.train.steps} steps in all",
            "schedule.warmup_steps",
            f"set it to at most {recipe.train.steps}",
        )
    if recipe.train.method == "full" and recipe.lora != Lora():
        yield Problem(
            '[lora] has no effect with method = "full"', "lora", 'remove the table, or set train.method = "lora"'
        )
    if recipe.train.method == "full" and recipe.memory.low_bit != "none":
        yield Problem(
            "all weights are trained, and none is frozen that could be held in fewer bits",
            "memory.low_bit",
            'remove it, or set train.method = "lora"',
        )
    if recipe.train.method == "lora" and recipe.train.float8:
        yield Problem(
            "float8 training is for weights that are trained",
            "train.float8",
            'remove it, or hold the frozen ones in float8: memory.low_bit = "float8"',
        )
    if recipe.validation.heldout and recipe.validation.heldout_clips:
        yield Problem(
            "held-out clips are both named and taken out of data.path",
            "validation.heldout_clips",
            "remove it, or validation.heldout",
        )
    if recipe.objective.sigma_min >= recipe.objective.sigma_max:
        yield Problem("sigma_min is not below sigma_max", "objective.sigma_min", "lower it")
    for key, effective, cure in _needs(recipe):
        if is_set(recipe, key) and not effective:
            yield Problem("this key has no effect here", key, f"remove it, or {cure}")
    for package in recipe.tracking.trackers:
        if find_spec(package) is None:
            yield Problem(
                f"{package} is not installed", "tracking.trackers", f'in the checkout: pip install -e ".[{package}]"'
            )


def _needs(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """(key, whether it has an effect, what it needs) of keys that depend on another."""
    sampling, schedule = recipe.objective.sigma_sampling, recipe.schedule.name
    for key in ("objective.logit_mean", "objective.logit_std"):
        yield key, sampling in (None, "logit_normal"), 'set objective.sigma_sampling = "logit_normal"'
    yield "objective.mode_scale", sampling == "mode", 'set objective.sigma_sampling = "mode"'
    yield "schedule.cycles", schedule == "cosine_with_restarts", 'set schedule.name = "cosine_with_restarts"'
    yield "schedule.power", schedule == "polynomial", 'set schedule.name = "polynomial"'
    checkpointing = recipe.memory.activation_checkpointing
    need = 'set memory.activation_checkpointing = "{}"'
    yield "memory.shard_size", recipe.memory.layout == "hybrid", 'set memory.layout = "hybrid"'
    yield "memory.checkpoint_every", checkpointing == "every_n", need.format("every_n")
    yield "memory.keep_gib", checkpointing == "selective", need.format("selective")
    validation = recipe.validation
    heldout = bool(validation.heldout or validation.heldout_clips)
    for key in ("validation.every", "validation.sigmas"):
        yield key, heldout, "set validation.heldout_clips, or validation.heldout to a dataset"
    prompts = bool(validation.prompts or validation.prompts_file)
    for key in ("validation.samples_every", "validation.tiling"):
        yield key, prompts, "add [[validation.prompts]]"
    yield "tracking.project", "wandb" in recipe.tracking.trackers, 'add "wandb" to tracking.trackers'


def is_set(recipe: Recipe, key: str) -> bool:
    """Whether a key differs from its default."""
    table, _, name = key.partition(".")
    return getattr(getattr(recipe, table), name) != type(getattr(recipe, table)).model_fields[name].default
