"""Everything about a recipe that can be wrong, found before a weight is read: recipe against itself, model and clips."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from torch import nn

from finetune.data.cache import Cache
from finetune.data.images import load_image, missing_image
from finetune.engine.layout import streams
from finetune.models import FAMILIES, family_class, lora
from finetune.models.family import Family
from finetune.models.folder import ModelFolder, resolve
from finetune.preparation.inspect import inspect_clips, split_heldout
from finetune.recipe import Recipe, load_recipe
from finetune.recipe.load import differences
from finetune.recipe.prompts import validation_prompts
from finetune.recipe.schema import Lora
from finetune.runtime.device import Device
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError


def check_all(recipe: Recipe, runtime: Runtime, gpus: int) -> list[Problem]:
    """Everything that is wrong with recipe, output folder, model folder and clips, for training on `gpus`. Collective."""
    problems = check_recipe(recipe, gpus) + check_device(recipe, runtime.device)
    cache = Cache(recipe.data.cache)
    datasets = [path for path in (recipe.data.path, recipe.validation.heldout) if path]
    parts: list[Callable[[], object]] = [lambda: check_output(recipe), lambda: open_family(recipe)]
    parts += [partial(inspect_clips, recipe.data, path, cache, runtime) for path in datasets[1:]]
    parts += [lambda: split_heldout(inspect_clips(recipe.data, recipe.data.path, cache, runtime), recipe)]
    parts += [partial(_load_images, recipe)]
    for part in parts:
        try:
            part()
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    return problems


def _load_images(recipe: Recipe) -> None:
    """Read every condition image, wherever it is; missing files are `family_problems`' business."""
    problems = []
    for prompt in validation_prompts(recipe.validation, recipe.data.buckets[0]):
        try:
            if prompt.image and not missing_image(prompt.image):
                load_image(prompt.image, *prompt.shape[1:])
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.of(problems)


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
        if _is_set(recipe, key) and not effective:
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


def open_family(recipe: Recipe, with_weights: bool = True) -> Family:
    """Find the model, check its files by their headers, and the recipe's buckets and targets against it.

    Args:
        with_weights: False to do with configs alone; weights are then neither fetched nor looked for.
    Raises:
        UserError: every problem of model folder and buckets at once.
    """
    cls = family_class(recipe.model.family)
    wanted = (
        [f"{name}/*" for name in cls.components]
        if with_weights
        else ["*/*config.json", "tokenizer*/*", *cls.read_when_opened]
    )
    folder = ModelFolder(resolve(recipe.model.path, recipe.model.revision, wanted))
    if folder.pipeline_class not in cls.pipeline_classes:
        fitting = [name for name in FAMILIES if folder.pipeline_class in family_class(name).pipeline_classes]
        right = f'set model.family = "{fitting[0]}", or model.path to a checkpoint of {cls.title}' if fitting else ""
        cure = right or f"families are: {', '.join(FAMILIES)}"
        trains = f"family {recipe.model.family!r} trains {' or '.join(cls.pipeline_classes)}"
        raise UserError(f"this is {folder.pipeline_class}, and {trains}", cure, str(folder.path))
    problems = folder.problems(cls.components) if with_weights else []
    if problems:
        raise UserError.of(problems, f"{folder.path}: {len(problems)} problems with the model:")
    family = cls(folder)
    transformer = family.empty_transformer()
    about_weights = _weight_problems(family, transformer) if with_weights else []
    if wrong := [*family_problems(recipe, family), *about_weights]:
        raise UserError.of(wrong)
    lora.check_targets(transformer, family, recipe.lora.targets)
    if wrong := list(_resident_problems(recipe, family, transformer)):
        raise UserError.of(wrong)
    return family


def _weight_problems(family: Family, transformer: nn.Module) -> Iterator[Problem]:
    """Where the transformer's config and the headers of its weights tell different models."""
    weights, where = family.transformer_weights(), str(family.folder.path / "transformer")
    cure = "download the transformer again; its config.json and its weights belong together"
    expected = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    names = weights.names()
    blocks = tuple(f"{name}." for name in family.block_lists)
    surplus = sorted(name for name in names - expected.keys() if name.startswith(blocks))
    for found, text in (
        (sorted(expected.keys() - names), "are not in its weights"),
        (surplus, "are not in its config"),
    ):
        if found:
            yield Problem(f"{len(found)} of the transformer's tensors {text}, {found[0]} among them", where, cure)
    for name in sorted(expected.keys() & names):
        if weights.shape(name) != expected[name]:
            has, wants = ("x".join(map(str, shape)) for shape in (weights.shape(name), expected[name]))
            yield Problem(f"{name} is {has} in its weights and {wants} by its config", where, cure)
            return


def _resident_problems(recipe: Recipe, family: Family, transformer: nn.Module) -> Iterator[Problem]:
    blocks = sum(len(getattr(transformer, name)) for name in family.block_lists)
    if recipe.memory.resident_blocks >= blocks:
        yield Problem(
            f"the model has {blocks} blocks; with all of them on the GPU nothing is offloaded",
            "memory.resident_blocks",
            f"set it to at most {blocks - 1}, or memory.offload = false",
        )


def family_problems(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """Settings of a recipe that its checkpoint cannot use; no weight is read."""
    yield from _unused(recipe, family)
    yield from _shape_problems(recipe, family)


def _unused(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """Settings that mean nothing to this checkpoint."""
    unused = family.unused_keys()
    default = family.objective(recipe.objective).default_sampling
    if recipe.objective.sigma_sampling is None and default != "logit_normal":
        unused |= dict.fromkeys(("objective.logit_mean", "objective.logit_std"), f"sigma_sampling is {default}")
    for key, why in unused.items():
        if _is_set(recipe, key):
            yield Problem(f"this key has no effect here: {why}", key, "remove it")


def _shape_problems(recipe: Recipe, family: Family) -> Iterator[Problem]:
    for bucket in recipe.data.buckets:
        if text := family.bucket_problem(bucket):
            yield Problem(f"{bucket}: {text}", "data.buckets")
    for prompt in validation_prompts(recipe.validation, recipe.data.buckets[0]):
        if text := family.bucket_problem(prompt.shape):
            yield Problem(f"{prompt.shape}: {text}", "validation.prompts")
        if text := family.prompt_problem(prompt):
            yield Problem(f"{prompt.text!r}: {text}", "validation.prompts")
        elif prompt.image and (missing := missing_image(prompt.image)):
            yield missing


def _is_set(recipe: Recipe, key: str) -> bool:
    """Whether a key differs from its default."""
    table, _, name = key.partition(".")
    return getattr(getattr(recipe, table), name) != type(getattr(recipe, table)).model_fields[name].default


def check_output(recipe: Recipe) -> None:
    """Refuse a folder that holds another training, and a disk without room.

    Raises:
        UserError: names the keys that differ.
    """
    saved = recipe.output / "recipe.toml"
    if saved.exists():
        changed = differences(recipe, load_recipe(saved))
        if changed:
            raise UserError(
                "this folder holds a run of another recipe: " + "; ".join(changed[:6]),
                "set `output` to a new folder, or put the keys back to resume",
                str(recipe.output),
            )
    folder = recipe.output
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise UserError("this is a file, and the run needs a folder", "set `output` to a folder", str(folder))
    if shutil.disk_usage(folder).free < 2**20:
        raise UserError("the disk is full", "free some space, or set `output` to another disk", str(recipe.output))
