"""A recipe against its model: the folder, the headers of its weights, and settings that this checkpoint cannot use."""

from collections.abc import Iterator

from torch import nn

from finetune.checks.output import has_checkpoints
from finetune.data.bucket_budget import near_lengths
from finetune.data.images import missing_image
from finetune.engine.weights.exporters import unknown_forms
from finetune.models import FAMILIES, family_class
from finetune.models.adapters import ADAPTERS
from finetune.models.adapters.given import check_given
from finetune.models.family import Family
from finetune.models.folder import CARD, ModelFolder, NotReached, resolve
from finetune.models.noise_range import Restricted
from finetune.models.published import PUBLISHED, PublishedFolder
from finetune.models.text_mask import why_masked
from finetune.preparation.own_shape import legal_shape, with_own_shape
from finetune.recipe import Recipe
from finetune.recipe.bucket import Area, Bucket
from finetune.recipe.experts import of_expert, recipes_of_experts
from finetune.recipe.prompts import validation_prompts
from finetune.recipe.schema import Model, is_set
from finetune.recipe.validation import Prompt
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.units import counted


def open_family(recipe: Recipe, with_weights: bool = True, trains: bool = True, only_plans: bool = False) -> Family:
    """Find the model, check its files by their headers, and the recipe's buckets and targets against it.

    Args:
        with_weights: False to do with configs alone; weights are then neither fetched nor looked for.
        trains: False to do without what only the begin of a training needs: the adapter of lora.start_from.
        only_plans: True where nothing is trained or generated: prompts' images are then not looked for, and without weights
            the configs that come with this package do where the Hub cannot be reached.
    Raises:
        UserError: every problem of model folder and buckets at once.
    """
    family = find_family(recipe.model, with_weights, from_package=only_plans)
    wrong = family.problems(recipe.model, recipe.data)
    wrong += _expert_problems(recipe, family)
    if wrong:
        raise UserError.of(wrong)
    family.select(recipe.model, recipe.data)
    transformer = family.empty_transformer()
    experts = [family.of_expert(name) for name in recipe.model.experts or family.experts] or [family]
    about_weights = [problem for each in experts if with_weights for problem in _weight_problems(each)]
    if wrong := [*family_problems(recipe, family, with_images=not only_plans), *about_weights]:
        raise UserError.of(wrong)
    if recipe.adapter is not None:
        ADAPTERS[recipe.train.method].check(transformer, family, recipe.adapter)
    for each in experts if with_weights else []:
        own = of_expert(recipe, each.expert) if each.expert else recipe
        check_given(transformer, each, recipe.adapter, begins=trains and not has_checkpoints(own))
    if wrong := list(_resident_problems(recipe, family, transformer)):
        raise UserError.of(wrong)
    return family


def find_family(model: Model, with_weights: bool = True, from_package: bool = False) -> Family:
    """Find the model, and check its files by their headers.

    Args:
        with_weights: see `open_family`.
        from_package: without weights, take the configs of this package where the Hub cannot be reached.
    Raises:
        UserError: every problem of the model folder at once.
    """
    cls = family_class(model.family)
    wanted = (
        [CARD, *(f"{name}/*" for name in (*cls.components, *cls.optional_components))]
        if with_weights
        else ["*/*config.json", "tokenizer*/*", *cls.read_when_opened]
    )
    folder = _folder(model, wanted, from_package and not with_weights)
    if why := cls.refusal(folder):
        fitting = [name for name in FAMILIES if family_class(name).refusal(folder) is None]
        cure = f"families are: {', '.join(FAMILIES)}"
        if fitting:
            name = family_class(fitting[0]).recipe_for(folder)
            recipes = f" (recipes/{name}_lora.toml and recipes/{name}_full.toml are for it)" if name else ""
            cure = f'set model.family = "{fitting[0]}"{recipes}, or model.path to a checkpoint of {cls.title}'
        raise UserError(why, cure, str(folder.path))
    problems = folder.problems(cls.needed_components(folder)) if with_weights else []
    if problems:
        raise UserError.of(problems, f"{folder.path}: {len(problems)} problems with the model:")
    return cls(folder)


def _folder(model: Model, wanted: list[str], from_package: bool) -> ModelFolder:
    """The model's folder, or that of its configs as they come with this package."""
    try:
        return ModelFolder(resolve(model.path, model.revision, wanted))
    except NotReached:
        if not from_package or model.path not in PUBLISHED or model.revision != "main":
            raise
        return PublishedFolder(model.path)


def _expert_problems(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """Steps and ranges of experts that there are not, or that a recipe leaves open."""
    steps, ranges = recipe.train.expert_steps, recipe.objective.expert_ranges
    if not family.experts:
        for key, table in (("train.steps", steps), ("objective.sigma_range", ranges)):
            if table:
                what = f"this checkpoint of {family.title} has no experts that this could differ for"
                yield Problem(what, key, "write one value in place of the table")
        return
    trained = recipe.model.experts or list(family.experts)
    if len(set(trained)) < len(trained):
        yield Problem(f"{trained} names an expert twice", "model.experts", "name each once")
    for each in recipes_of_experts(recipe, list(family.experts)):
        if recipe.schedule.warmup_steps > each.train.steps:
            warm_up = counted(recipe.schedule.warmup_steps, "warm-up step")
            what = f"{warm_up}, but only {counted(each.train.steps, 'step')} of one expert"
            yield Problem(what, "schedule.warmup_steps", f"set it to at most {each.train.steps}")
    missing = [name for name in trained if name not in steps]
    if steps and missing and recipe.train.steps == max(steps.values()):
        what = f"the table of steps does not name the expert {missing[0]!r}, which is trained, too"
        yield Problem(what, "train.steps", "name both, or set model.experts to the one that is to be trained")
    if recipe.objective.sigma_range and len(trained) > 1:
        cure = "write a table: {high = [0.8, 1.0], low = [0.0, 0.9]}; or set model.experts to the one that it is for"
        yield Problem("one range of noise levels for two experts", "objective.sigma_range", cure)


def _weight_problems(family: Family) -> Iterator[Problem]:
    """Where the trained transformer's config and the headers of its weights tell different models."""
    transformer = family.empty_transformer()
    component, weights = family.trained_component, family.transformer_weights()
    where = str(family.folder.path / component)
    cure = f"download the {component} again; its config.json and its weights belong together"
    expected = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    names = weights.names()
    blocks = tuple(f"{name}." for name in family.block_lists)
    surplus = sorted(name for name in names - expected.keys() if name.startswith(blocks))
    for found, text in (
        (sorted(expected.keys() - names), "are not in its weights"),
        (surplus, "are not in its config"),
    ):
        if found:
            yield Problem(f"{len(found)} of the {component}'s tensors {text}, {found[0]} among them", where, cure)
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


def family_problems(recipe: Recipe, family: Family, with_images: bool = True) -> Iterator[Problem]:
    """Settings of a recipe that its checkpoint cannot use; no weight is read.

    Args:
        with_images: whether prompts' images must be there.
    """
    yield from _unused(recipe, family)
    yield from _attention_problems(recipe, family)
    yield from _shape_problems(recipe, family, with_images)
    yield from unknown_forms(recipe.train.method, recipe.export.formats, family)
    recipe = with_own_shape(recipe, family, is_said=False)
    for each in recipes_of_experts(recipe, list(family.experts)):
        experts = each.model.experts
        yield from _noise_problems(each, family.of_expert(experts[0]) if experts and family.experts else family)


def _unused(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """Settings that mean nothing to this checkpoint."""
    unused = family.unused_keys()
    settings = recipe.objective
    default = family.training_objective(settings).default_sampling
    if settings.sigma_sampling is None and settings.sigma_table is None and default != "logit_normal":
        unused |= dict.fromkeys(("objective.logit_mean", "objective.logit_std"), f"sigma_sampling is {default}")
    for key, why in unused.items():
        if is_set(recipe, key):
            yield Problem(f"this key has no effect here: {why}", key, "remove it")
    if settings.weighting not in family.weightings:
        what = f'"{settings.weighting}" has no effect here: {family.title} is trained by another objective'
        others = " or ".join(f'"{name}"' for name in family.weightings if name != "none")
        yield Problem(what, "objective.weighting", f"remove it, or set it to {others}")
    told = settings.guidance
    if "objective.guidance" not in unused and settings.guidance_target not in (None, told):
        what = f"{family.title} is told the scale of its guidance, {told:g}, but its target would have another"
        cure = (
            f"set objective.guidance = {settings.guidance_target:g}, too, which then is the guidance to generate with"
        )
        yield Problem(what, "objective.guidance_target", cure)


def _noise_problems(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """A range of noise levels in which the distribution has none."""
    objective = family.training_objective(recipe.objective)
    if not isinstance(objective, Restricted) or objective.sigma_range[0] >= objective.sigma_range[1]:
        return  # see `check_recipe` for the latter
    for tokens in dict.fromkeys(map(family.tokens, recipe.data.buckets)):
        if objective.is_empty(tokens):
            where = "objective.sigma_range" if recipe.objective.sigma_range else "objective"
            cure = "move the range, or the limits that sigma_min and sigma_max set"
            yield Problem(objective.why_empty(tokens), where, cure)
            return


def _attention_problems(recipe: Recipe, family: Family) -> Iterator[Problem]:
    """Kernels that err, or fail, with the masks that the family's attention has in training."""
    kernel, masks = recipe.memory.attention, family.attention_masks
    why = why_masked(masks, recipe.train.micro_batch_size, recipe.memory.compile)
    if why is None or kernel in ("auto", "efficient", "math"):
        return
    cure = 'set it to "efficient" or "auto"'
    if masks == "padding":
        cure += f", or {'memory.compile = false' if recipe.memory.compile else 'train.micro_batch_size = 1'}"
    if kernel != "cudnn":
        yield Problem(f"the flash kernels take no masks, and in {family.title} {why}", "memory.attention", cure)
    elif masks == "padding":  # see `choose_kernel`
        what = "cuDNN's gradients may be NaN with a mask, if the number of tokens is 64 modulo 128"
        yield Problem(f"{what}; in {family.title} {why}", "memory.attention", cure)


def _shape_problems(recipe: Recipe, family: Family, with_images: bool) -> Iterator[Problem]:
    if recipe.data.area and not recipe.data.buckets and legal_shape(recipe.data, family) is None:
        least = Area(*family.nearest_bucket(Bucket(max(recipe.data.frames), 1, 1))[1:])
        what = f"{recipe.data.area} has fewer pixels than any shape that {family.title} takes"
        yield Problem(what, "data.area", f"the least is {least}")
    known = with_own_shape(recipe, family, is_said=False).data
    refused = {bucket: text for bucket in known.buckets if (text := family.bucket_problem(bucket))}
    for bucket, text in refused.items():
        yield _bucket_problem(recipe, family, bucket, text)
    for prompt in validation_prompts(recipe.validation, known.sample_shape):
        if (text := family.bucket_problem(prompt.shape)) and prompt.shape not in refused:
            yield Problem(f"{prompt.shape}: {text}", "validation.prompts")
        yield from _strength_problems(recipe, prompt)
        if text := family.prompt_problem(prompt):
            yield Problem(f"{prompt.text!r}: {text}", "validation.prompts")
        elif with_images:
            yield from filter(None, map(missing_image, prompt.images))


def _strength_problems(recipe: Recipe, prompt: Prompt) -> Iterator[Problem]:
    key = "validation.prompts"
    if recipe.train.method != "lora" and (prompt.strengths != [1.0] or prompt.control):
        what = "control" if prompt.control else "strength"
        yield Problem(
            f"{prompt.text!r}: {what} is about a LoRA, and train.method is {recipe.train.method}",
            key,
            f'remove {what}, or set train.method = "lora"',
        )
    if prompt.control:
        words = {recipe.data.reading(source)["id_token"].lower() for source in recipe.data.datasets} - {""}
        for word in sorted(word for word in words if word in prompt.text.lower()):
            yield Problem(f"{prompt.text!r}: a control prompt has no trigger word ({word})", key, "leave the word out")


def _bucket_problem(recipe: Recipe, family: Family, bucket: Bucket, text: str) -> Problem:
    """A bucket that the model cannot be trained at, and why; of `data.area` and `data.frames`, which of them is to be changed."""
    if recipe.data.area is None or recipe.data.buckets:
        return Problem(f"{bucket}: {text}", "data.buckets")
    if lengths := near_lengths(bucket, lambda other: family.bucket_problem(other) is None):
        cure = f"the nearest {'lengths are' if len(lengths) > 1 else 'length is'} {' and '.join(map(str, lengths))}"
        return Problem(f"{bucket.frames}: {text.partition(';')[0]}", "data.frames", cure)
    return Problem(f"{recipe.data.area}: {text}", "data.area")
