"""diffusion-pipe: its TOML of the training, the TOML of the dataset that it names, and the command that starts it."""

from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import NOT_NEEDED, ClipFolder
from finetune.importers.diffusion_pipe_data import put_data, put_memory, put_rest
from finetune.importers.draft import Draft
from finetune.importers.families import family_named, published, put_experts, put_published
from finetune.importers.launching import launched_gpus
from finetune.importers.settings import (
    Settings,
    anything,
    flag,
    from_arguments,
    integer,
    number,
    numbers,
    tables,
    text,
)
from finetune.importers.sources import SettingsFile, beside, commands, one_command
from finetune.runtime.errors import UserError

NAME = "diffusion-pipe"
READS = "the TOML of the training, with [model] type, and the TOML of its dataset"

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_optimi": "adamw",
    "stableadamw": "adamw",
    "adamw8bit": "adamw_8bit",
    "adamw8bitkahan": "adamw_8bit",
    "offload": "adamw",
    "lion": "lion",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
    "schedulefreeadamw": "schedule_free_adamw",
}
_WITH_BETAS = ("adamw", "adamw_8bit", "lion", "prodigy", "schedule_free_adamw")
_EVAL = "the held-out loss is measured with the training's batch"
_DROPPED = {
    "pipeline_stages": "samples are not divided over GPUs; memory.layout shards weights over them",
    "image_micro_batch_size_per_gpu": "images and videos have one micro-batch",
    "eval_micro_batch_size_per_gpu": _EVAL,
    "image_eval_micro_batch_size_per_gpu": _EVAL,
    "eval_gradient_accumulation_steps": _EVAL,
    "eval_before_first_step": "the held-out loss is always measured at the start, too",
    "disable_block_swap_for_eval": "held-out loss and samples are computed as the training is",
    "reentrant_activation_checkpointing": "checkpointing is not reentrant",
    "partition_method": "samples are not divided over GPUs",
    "partition_split": "samples are not divided over GPUs",
    "save_dtype": "an adapter is exported in float32 or as export says; see recipes/adapters.md",
    "caching_batch_size": NOT_NEEDED["slicing"],
    "map_num_proc": "each process of torchrun encodes its share of the clips",
    "steps_per_print": "each step is logged",
    "logging_steps": "each step is logged",
    "x_axis_examples": "metrics are over steps",
    "checkpoint_every_n_minutes": "set checkpoint.every, in steps; a polite stop saves, too",
    "save_every_n_examples": "set checkpoint.every, in steps",
    "checkpoint_every_n_epochs": "set checkpoint.every, in steps",
    "eval_every_n_examples": "set validation.every, in steps",
    "resume_from_checkpoint": NOT_NEEDED["resume"],
    "regenerate_cache": "what is cached is known by its content",
    "force_constant_lr": "optimizer.lr may be changed when a run is resumed",
}


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    if commands(sources, r"train\.py", "--config"):
        return True
    return any(isinstance(each.data, dict) and (_is_training(each.data) or _is_dataset(each.data)) for each in sources)


def _is_training(data: dict[str, Any]) -> bool:
    return isinstance(model := data.get("model"), dict) and "type" in model


def _is_dataset(data: dict[str, Any]) -> bool:
    return isinstance(data.get("directory"), list)


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    source = _training(draft, sources)
    given = Settings(source.data, source.file, NAME)
    draft.gpus = (draft.gpus or 1) // max(1, given.take("pipeline_stages", integer, 1)) or 1
    model = given.table("model")
    _model(draft, model)
    given.move(draft, {"output_dir": ("output", text)})
    _adapter(draft, given)
    dataset = _dataset(draft, given, sources, source.file)
    datasets = put_data(draft, dataset, given)
    _steps(draft, given, datasets)
    _objective(draft, model, given)
    _optimizer(draft, given)
    put_memory(draft, given, model)
    put_rest(draft, given, sources, source.file)
    model.name_the_rest(draft)
    given.drop(draft, _DROPPED)
    given.name_the_rest(draft)


def _training(draft: Draft, sources: Sequence[SettingsFile]) -> SettingsFile:
    """The TOML of the training: given, or named by a command."""
    found = commands(sources, r"train\.py", "--config")
    if found:
        command = one_command(draft, found)
        draft.gpus = draft.gpus or launched_gpus(command.launcher)
        options = from_arguments(command.arguments, command.source.file, NAME)
        path = options.take("config", text, "")
        options.drop(
            draft,
            {
                "deepspeed": "torchrun starts the processes",
                "local_rank": "torchrun starts the processes",
                "master_port": "torchrun has --rdzv_endpoint",
                "resume_from_checkpoint": NOT_NEEDED["resume"],
                "regenerate_cache": _DROPPED["regenerate_cache"],
                "trust_cache": _DROPPED["regenerate_cache"],
                "cache_only": "python -m finetune prepare --recipe R does that",
                "i_know_what_i_am_doing": "nothing is checked there that could be left out",
            },
        )
        options.name_the_rest(draft)
        source = beside(sources, path, command.source.file)
        if source is None:
            raise UserError(
                f"--config {path} is not here", f"give it, too: finetune import {path}", command.source.file
            )
    else:
        source = next((each for each in sources if isinstance(each.data, dict) and _is_training(each.data)), None)
        if source is None:
            cure = "give the TOML that names it, too: finetune import config.toml dataset.toml"
            raise UserError("the dataset alone, without the TOML that has [model]", cure, sources[0].file)
    if not isinstance(source.data, dict) or not _is_training(source.data):
        raise UserError("no [model] type in it", "give the TOML of the training", source.file)
    source.is_used = True
    return source


def _dataset(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> Settings:
    path = given.take("dataset", text, "")
    source = beside(sources, path, file) if path else None
    if source is None:
        source = next((each for each in sources if isinstance(each.data, dict) and _is_dataset(each.data)), None)
    if source is None:
        cure = f"give it, too: finetune import {file} dataset.toml"
        raise UserError(f"its dataset {path!r} is not here", cure, file)
    source.is_used = True
    if path:
        draft.read(given.spelled("dataset"), "its directories are in [data]")
    if not isinstance(source.data, dict):
        raise UserError("no [[directory]] in it", "give the TOML of the dataset", source.file)
    return Settings(source.data, source.file, NAME)


def _model(draft: Draft, model: Settings) -> None:
    kind = model.take("type", text, "")
    paths = {
        name: model.take(name, text, "")
        for name in ("ckpt_path", "diffusers_path", "transformer_path", "single_file_path")
    }
    weights = model.take("diffusion_model", text, "") or paths["transformer_path"] or paths["ckpt_path"]
    written = " ".join(filter(None, [weights, *paths.values()]))
    family = family_named(kind, (weights or paths["diffusers_path"]).replace(" ", "-"), f"{model.file}: model.type")
    if family.startswith("ltx") and model.take("first_frame_conditioning_p", number, 0) > 0:
        name = "first_frame_conditioning_p"
        draft.change(
            model.spelled(name),
            "data.image_dropout",
            1 - model.take(name, number, 0),
            "the share that has no first frame",
        )
        family = "ltx_i2v"
    draft.move(model.spelled("type"), "model.family", family)
    names = [name for name in (*paths, "diffusion_model") if name in model]
    setting = "; ".join(map(model.spelled, names)) or "no path"
    if paths["diffusers_path"] and not paths["single_file_path"]:
        draft.move(model.spelled("diffusers_path"), "model.path", paths["diffusers_path"])
    else:
        put_published(draft, setting, published(family, written), weights or paths["single_file_path"] or "the model")
    put_experts(draft, written)


def _adapter(draft: Draft, given: Settings) -> None:
    if "adapter" not in given:
        draft.default("no [adapter]", "train.method", "full", "all weights are trained")
        return
    adapter = given.table("adapter")
    kind = adapter.take("type", text, "lora")
    if kind == "lora":
        draft.move(adapter.spelled("type") if "type" in adapter else "[adapter]", "train.method", "lora")
    else:
        draft.change(adapter.spelled("type"), "train.method", "lora", f"{kind} cannot be trained here")
    rank = adapter.take("rank", integer, 32)
    if rank > 32768:
        draft.change(adapter.spelled("rank"), "lora.rank", 64, "more than any layer has")
        rank = 64
    else:
        draft.move(adapter.spelled("rank") if "rank" in adapter else "rank is 32", "lora.rank", rank)
    draft.default("alpha cannot be set there", "lora.alpha", rank, "it is the rank")
    adapter.move(draft, {"dropout": ("lora.dropout", number), "init_from_existing": ("lora.start_from", text)})
    fused = adapter.take("fuse_adapters", tables, [])
    if fused:
        frozen = [{"path": str(each.get("path", "")), "strength": number(each.get("weight", 1.0))} for each in fused]
        draft.change(
            "adapter.fuse_adapters", "lora.frozen", frozen, "they are added beside the base weights, not into them"
        )
    adapter.drop(
        draft,
        {
            "dtype": "what is trained is held in train.weights: float32",
            "rank_dropout": "an adapter's input has dropout, its rank has not",
            "decompose_factor": "it is LoKr's",
            "exclude_linear_modules": "name what is trained in lora.targets",
        },
    )
    adapter.name_the_rest(draft)


def _steps(draft: Draft, given: Settings, datasets: list[ClipFolder]) -> None:
    per_gpu, accumulation = 1, max(1, given.take("gradient_accumulation_steps", integer, 1))
    raw = given.take("micro_batch_size_per_gpu", anything, 1)
    if isinstance(raw, list):
        draft.drop(
            given.spelled("micro_batch_size_per_gpu"), "a batch by resolution: the least of them is taken for all"
        )
        per_gpu = max(
            1, min((integer(pair[1]) for pair in raw if isinstance(pair, list) and len(pair) == 2), default=1)
        )
    else:
        per_gpu = max(1, given.take("micro_batch_size_per_gpu", integer, 1))
    names = [name for name in ("micro_batch_size_per_gpu", "gradient_accumulation_steps") if name in given]
    common.put_batch(
        draft, "; ".join(map(given.spelled, names)) or "micro_batch_size_per_gpu is 1", per_gpu, accumulation
    )
    epochs, steps = given.take("epochs", number, 1), given.take("max_steps", integer, None)
    if steps:
        draft.move(given.spelled("max_steps"), "train.steps", steps)
        given.drop(draft, {"epochs": "max_steps ends the run"})
        if "epochs" in given:
            draft.drop(given.spelled("epochs"), "train.steps ends the run")
    else:
        common.put_epochs(draft, given.spelled("epochs") if "epochs" in given else "epochs is 1", epochs, datasets)
    _every(draft, given, "save_every", "checkpoint.every", epochs, steps)
    for kind in ("checkpoint_every_n_minutes", "checkpoint_every_n_epochs"):
        given.drop(draft, {kind: _DROPPED[kind]})


def _every(draft: Draft, given: Settings, name: str, key: str, epochs: float, steps: int | None) -> None:
    by_steps, by_epochs = f"{name}_n_steps", f"{name}_n_epochs"
    if given.take(by_steps, integer, None):
        common.put_every(draft, given.spelled(by_steps), key, given.take(by_steps, integer, 0))
    elif between := given.take(by_epochs, number, None):
        if steps or not epochs or any(what.startswith("train.steps") for what in draft.todo):
            draft.drop(given.spelled(by_epochs), f"set {key}, in steps")
        else:
            count = common.every_of_epochs(draft, between, epochs)
            common.put_every(draft, given.spelled(by_epochs), key, count, "steps are counted, not epochs")


def _objective(draft: Draft, model: Settings, given: Settings) -> None:
    name = "timestep_sample_method"
    method = model.take(name, text, "logit_normal")
    setting = model.spelled(name) if name in model else "model.timestep_sample_method is logit_normal"
    if method in ("logit_normal", "uniform"):
        draft.move(setting, "objective.sigma_sampling", method)
    else:
        draft.change(setting, "objective.sigma_sampling", "logit_normal", f"a recipe has no {method!r}")
    scale = model.take("sigmoid_scale", number, None)
    if scale and method == "logit_normal":
        draft.move(model.spelled("sigmoid_scale"), "objective.logit_std", scale)
    elif scale is not None:
        draft.drop(model.spelled("sigmoid_scale"), f"{method} does not read it")
    shift = model.take("shift", number, None)
    if shift:
        draft.move(model.spelled("shift"), "objective.shift", shift)
    elif model.take("flux_shift", flag, False):
        why = "by the number of tokens, as the checkpoint's scheduler has it"
        draft.change(model.spelled("flux_shift"), "objective.shift", "scheduler", why)
    else:
        why = 'sigma is not shifted there unless it is set; "scheduler" does what the checkpoint\'s scheduler does'
        draft.default("model.shift is not set", "objective.shift", 1.0, why)
    guidance = model.take("guidance", number, None)
    if draft.family == "hunyuan" and guidance is not None:
        draft.move(model.spelled("guidance"), "objective.guidance", guidance)
    elif guidance is not None:
        draft.drop(model.spelled("guidance"), f"{draft.family} is told no guidance")
    for name, low in (("min_t", True), ("max_t", False)):
        if (limit := model.take(name, number, None)) is not None:
            value = [limit, 1.0] if low else [draft.get("objective.sigma_range", [0.0])[0], limit]
            if "A14B" in str(draft.get("model.path", "")):
                draft.drop(model.spelled(name), "each expert has the range that the checkpoint says")
            else:
                draft.change(model.spelled(name), "objective.sigma_range", value, "the range of sigma, in [0, 1]")
    constant = given.take("pseudo_huber_c", number, None)
    if constant:
        why = "huber with this delta: near it in form, with another scale"
        draft.change(given.spelled("pseudo_huber_c"), "objective.loss", "huber", why)
        draft.put("objective.loss_delta", constant)


def _optimizer(draft: Draft, given: Settings) -> None:
    table = given.table("optimizer")
    kind = table.take("type", text, "")
    if not kind:
        raise UserError("no [optimizer] type in it", 'add it, like type = "adamw_optimi"', given.file)
    ours = _OPTIMIZERS.get(kind.lower())
    if ours is None:
        draft.change(table.spelled("type"), "optimizer.name", "adamw", f"a recipe has no {kind!r}")
        ours = "adamw"
    elif ours == kind.lower():
        draft.move(table.spelled("type"), "optimizer.name", ours)
    else:
        kahan = (
            "updates of float32 weights, which need no Kahan sum"
            if "kahan" in kind.lower() or "optimi" in kind.lower()
            else ""
        )
        draft.change(table.spelled("type"), "optimizer.name", ours, kahan)
    if kind.lower() == "offload":
        draft.put("optimizer.offload", "state")
    table.move(draft, {"lr": ("optimizer.lr", number), "weight_decay": ("optimizer.weight_decay", number)})
    betas = table.take("betas", numbers, None)
    if betas and len(betas) >= 2 and ours in _WITH_BETAS:
        draft.move(table.spelled("betas"), "optimizer.betas", betas[:2])
    if ours in _WITH_BETAS and ours != "lion":
        table.move(draft, {"eps": ("optimizer.eps", number)})
    if table.take("gradient_release", flag, False):
        if (
            draft.method == "full"
            and draft.get("train.global_batch_size") == draft.get("train.micro_batch_size", 1) * draft.gpus
        ):
            draft.change(
                table.spelled("gradient_release"), "optimizer.in_backward", True, "gradients cannot be clipped then"
            )
            draft.put("train.max_grad_norm", "none")
        else:
            draft.drop(table.spelled("gradient_release"), "it is for full finetuning without accumulation")
    table.drop(
        draft,
        {
            "stabilize": "gradients are clipped instead",
            "betas": f"{ours} has no such key",
            "eps": f"{ours} has no such key",
            "beta2_half_life": "write the second beta itself",
            "gradient_release": "it is off",
        },
    )
    table.name_the_rest(draft)
    warmup = given.take("warmup_steps", integer, 0)
    name = given.take("lr_scheduler", text, "constant")
    setting = given.spelled("lr_scheduler") if "lr_scheduler" in given else "lr_scheduler is constant"
    if name == "constant" and warmup:
        draft.change(setting, "schedule.name", "constant_with_warmup", "warm-up is part of the schedule's name")
        common.put_schedule(draft, setting, "constant_with_warmup", warmup, given.spelled("warmup_steps"))
        draft.notes = [
            note
            for note in draft.notes
            if not (note.outcome in ("kept", "renamed") and note.target.startswith("schedule.name"))
        ]
    else:
        common.put_schedule(draft, setting, name, warmup, given.spelled("warmup_steps") if warmup else "")
    clipping = given.take("gradient_clipping", number, None)
    if clipping is not None and draft.get("train.max_grad_norm") != "none":
        draft.move(given.spelled("gradient_clipping"), "train.max_grad_norm", clipping if clipping > 0 else "none")
    elif clipping is not None:
        draft.drop(
            given.spelled("gradient_clipping"), "gradients that are dropped in the backward pass cannot be clipped"
        )
