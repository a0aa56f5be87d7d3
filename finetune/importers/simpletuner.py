"""SimpleTuner: config.json, and the JSON of its data backends."""

from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import NOT_NEEDED, ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import (
    MODELS,
    family_named,
    legal_area,
    legal_bucket,
    published,
    put_published,
    why_not,
)
from finetune.importers.finetrainers_extras import put_checkpointing
from finetune.importers.settings import Settings, anything, flag, integer, number, text
from finetune.importers.sources import SettingsFile, beside
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError

NAME = "SimpleTuner"
READS = "config.json with model_family and model_type, and the JSON of its data_backend_config"

_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_bf16": "adamw_bf16",
    "lion": "lion",
    "prodigy": "prodigy",
    "adafactor": "adafactor",
}
_LOW_BITS = {"int8": "int8", "fp8": "float8", "int4": "nf4", "int2": "nf4", "nf4": "nf4"}
_DROPPED = {
    **dict.fromkeys(("hub_model_id", "push_to_hub", "push_checkpoints_to_hub", "model_card_note"), NOT_NEEDED["hub"]),
    **dict.fromkeys(
        ("vae_batch_size", "vae_enable_slicing", "vae_cache_ondemand", "compress_disk_cache"), NOT_NEEDED["slicing"]
    ),
    **dict.fromkeys(
        ("quantize_via", "offload_during_startup", "disable_benchmark", "disable_bucket_pruning"),
        "nothing here that it would change",
    ),
    **dict.fromkeys(
        ("aspect_bucket_rounding", "minimum_image_size", "aspect_bucket_alignment"), "shapes are found by data.area"
    ),
    **dict.fromkeys(
        ("delete_problematic_images", "delete_unwanted_images"),
        "clips are never deleted; data.bad_clips says what happens",
    ),
    **dict.fromkeys(("context_parallel_size", "context_parallel_comm_strategy"), "samples are not divided over GPUs"),
    "resume_from_checkpoint": NOT_NEEDED["resume"],
    "allow_tf32": NOT_NEEDED["tf32"],
    "attention_mechanism": 'memory.attention = "auto" has torch choose',
    "grad_clip_method": "the norm of all gradients is clipped",
    "gradient_checkpointing_interval": 'memory.activation_checkpointing = "every_n" has memory.checkpoint_every',
    "ema_update_interval": "set ema.every",
    "strict_epoch_limit": "train.steps ends a run",
    "lora_type": "LoRA",
    "tread_config": "all tokens are computed",
    "validation_prompt_library": "write its prompts as [[validation.prompts]]",
    "pretrained_t5_model_name_or_path": "each part is taken from model.path",
    "pretrained_vae_model_name_or_path": "each part is taken from model.path",
    "metadata_update_interval": "nothing here that it would change",
}


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    return any(isinstance(each.data, dict) and "model_family" in _plain(each.data) for each in sources)


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    """The settings without the dashes that their names may begin with."""
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in data.items()}


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    source = next(each for each in sources if isinstance(each.data, dict) and "model_family" in _plain(each.data))
    source.is_used = True
    given = Settings(_plain(source.data), source.file, NAME)
    draft.gpus = draft.gpus or given.take("num_processes", integer, 1)
    _model(draft, given)
    given.move(draft, {"output_dir": ("output", text), "seed": ("train.seed", integer)})
    given.move(
        draft,
        {"caption_dropout_probability": ("data.caption_dropout", number), "vae_enable_tiling": ("vae.tiling", flag)},
    )
    datasets = _data(draft, given, sources, source.file)
    _steps(draft, given, datasets)
    _objective(draft, given)
    _optimizer(draft, given)
    _memory(draft, given)
    _validation(draft, given)
    given.drop(draft, _DROPPED)
    given.name_the_rest(draft)


def _model(draft: Draft, given: Settings) -> None:
    kind, flavour = given.take("model_family", text, ""), given.take("model_flavour", text, "")
    path = given.take("pretrained_model_name_or_path", text, "")
    family = family_named(kind, (path or flavour).lower(), f"{given.file}: model_family")
    draft.move(given.spelled("model_family"), "model.family", family)
    if path:
        draft.move(given.spelled("pretrained_model_name_or_path"), "model.path", path)
        given.drop(draft, {"model_flavour": "the path goes before it"})
        if "model_flavour" in given:
            draft.drop(given.spelled("model_flavour"), "the path goes before it")
    else:
        name = published(family, flavour)
        put_published(
            draft,
            given.spelled("model_flavour") if flavour else "no path",
            name if name in MODELS else family,
            flavour or kind,
        )
    high = [each for each in ("high", "low") if flavour.endswith(each)]
    if high and "A14B" in str(draft.get("model.path", "")):
        draft.change(given.spelled("model_flavour"), "model.experts", high, "the expert that is trained")
    method = given.take("model_type", text, "lora")
    draft.move(
        given.spelled("model_type") if "model_type" in given else "model_type is lora",
        "train.method",
        "lora" if method == "lora" else "full",
    )
    if method == "lora":
        rank = given.take("lora_rank", integer, 16)
        draft.move(given.spelled("lora_rank") if "lora_rank" in given else "lora_rank is 16", "lora.rank", rank)
        alpha = given.take("lora_alpha", number, None)
        if alpha is None:
            draft.default("lora_alpha is not set", "lora.alpha", rank, "the rank is taken")
        else:
            draft.move(given.spelled("lora_alpha"), "lora.alpha", alpha)
        given.move(draft, {"lora_dropout": ("lora.dropout", number), "init_lora": ("lora.start_from", text)})
        given.move(draft, {"use_dora": ("lora.dora", flag)})
    given.drop(draft, dict.fromkeys(("lora_rank", "lora_alpha"), "all weights are trained"))


def _data(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> list[ClipFolder]:
    path = given.take("data_backend_config", text, "")
    source = (beside(sources, path, file) if path else None) or next(
        (each for each in sources if isinstance(each.data, list)), None
    )
    if source is None or not isinstance(source.data, list):
        raise UserError(
            f"data_backend_config {path} is not here",
            f"give it, too: finetune import {file} {path or 'multidatabackend.json'}",
            file,
        )
    source.is_used = True
    if path:
        draft.read(given.spelled("data_backend_config"), "its datasets are in [data]")
    found, sides, lengths = [], [], []
    default_side, default_kind = (
        given.take("resolution", number, 1024),
        given.take("resolution_type", text, "pixel_area"),
    )
    for number_, data in enumerate(each for each in source.data if isinstance(each, dict)):
        entry = Settings(data, source.file, NAME, f"[{number_}].")
        kind, name = entry.take("dataset_type", text, "image"), entry.take("id", text, f"[{number_}]")
        if kind not in ("image", "video") or entry.take("disabled", flag, False):
            draft.drop(
                f"data backend {name}",
                f"{kind}: what is cached is in data.cache" if "embed" in kind else f"{kind} is not trained on",
            )
            continue
        where = entry.take("instance_data_dir", text, "") or entry.take("dataset_name", text, "")
        if not where:
            raise UserError(f"the data backend {name} has no instance_data_dir", "add it", source.file)
        found.append(ClipFolder(where, entry.take("repeats", number, 0) + 1))
        if "repeats" in entry:
            draft.read(entry.spelled("repeats"), "theirs come on top of the first time: repeats here are one more")
        side, unit = entry.take("resolution", number, default_side), entry.take("resolution_type", text, default_kind)
        if unit == "pixel":
            draft.todo.append(
                f"resolution of {name} is the shorter side there, and the side of a square here: see data.area"
            )
        side = max(side, 1e-3)
        sides.append(round(side**0.5 * 1000) if unit == "area" or side < 16 else round(side))
        video = entry.table("video")
        lengths.append(video.take("num_frames", integer, 1 if kind == "image" else 49))
        video.drop(
            draft,
            dict.fromkeys(
                ("min_frames", "max_frames", "bucket_strategy", "frame_interval", "is_i2v"),
                "data.frames has the lengths",
            ),
        )
        video.name_the_rest(draft)
        columns = entry.table("huggingface")
        columns.move(
            draft, {"video_column": ("data.video_column", text), "caption_column": ("data.caption_column", text)}
        )
        columns.name_the_rest(draft)
        for each in ("resolution", "resolution_type"):
            if each in entry:
                draft.read(entry.spelled(each), "it is in data.area")
        small = (
            "type",
            "crop",
            "crop_style",
            "crop_aspect",
            "minimum_image_size",
            "maximum_image_size",
            "target_downsample_size",
        )
        entry.drop(
            draft, dict.fromkeys(small, "clips are scaled until they cover their shape, and cut to it in the middle")
        )
        cached = (
            "metadata_backend",
            "cache_dir_vae",
            "cache_dir",
            "vae_cache_clear_each_epoch",
            "text_embeds",
            "default",
        )
        entry.drop(draft, dict.fromkeys(cached, "all that is cached is in data.cache"))
        entry.drop(
            draft,
            {
                "caption_strategy": "captions beside the clips are found by themselves",
                "probability": "see repeats of [[data.sources]]",
            },
        )
        entry.name_the_rest(draft)
    if not found:
        raise UserError("no data backend of images or videos in it", "add one, with its instance_data_dir", source.file)
    common.put_datasets(draft, "instance_data_dir", found)
    side = max(32, *sides)
    legal = [legal_bucket(draft, Bucket(max(1, length), side, side)).frames for length in lengths]
    notes = ["the side of a square of so many pixels", draft.put("data.frames", sorted(set(legal)))]
    notes.append("" if legal == lengths else f"{why_not(draft)}: {lengths} are {legal}")
    draft.change(
        f"resolution = {side}; num_frames = {lengths}",
        "data.area",
        str(legal_area(draft, Area(side, side))),
        "; ".join(filter(None, notes)),
    )
    return found


def _steps(draft: Draft, given: Settings, datasets: list[ClipFolder]) -> None:
    common.put_script_batch(draft, given, "")
    steps, epochs = given.take("max_train_steps", integer, 0), given.take("num_train_epochs", number, 0)
    if steps > 0:
        draft.move(given.spelled("max_train_steps"), "train.steps", steps)
        if "num_train_epochs" in given:
            draft.drop(given.spelled("num_train_epochs"), "max_train_steps goes before it")
    else:
        common.put_epochs(
            draft, given.spelled("num_train_epochs") if epochs else "num_train_epochs is 1", epochs or 1, datasets
        )
    every = "checkpoint_step_interval" if "checkpoint_step_interval" in given else "checkpointing_steps"
    given.move(
        draft, {every: ("checkpoint.every", integer), "checkpoints_total_limit": ("checkpoint.keep_last", integer)}
    )


def _objective(draft: Draft, given: Settings) -> None:
    if draft.family.startswith("cogvideox"):
        return
    uniform = given.take("flow_use_uniform_schedule", flag, False)
    scale = given.take("flow_sigmoid_scale", number, None)
    draft.put("objective.sigma_sampling", "uniform" if uniform else "logit_normal")
    if uniform:
        draft.move(given.spelled("flow_use_uniform_schedule"), "objective.sigma_sampling", "uniform")
    elif scale:
        draft.move(given.spelled("flow_sigmoid_scale"), "objective.logit_std", scale)
    shift = given.take("flow_schedule_shift", number, None)
    if given.take("flow_schedule_auto_shift", flag, False):
        draft.change(
            given.spelled("flow_schedule_auto_shift"),
            "objective.shift",
            "scheduler",
            "as the checkpoint's scheduler does it",
        )
    elif shift:
        draft.move(given.spelled("flow_schedule_shift"), "objective.shift", shift)
    elif shift is None:
        draft.default("flow_schedule_shift is not set", "objective.shift", 3, "SimpleTuner takes 3")
    else:
        draft.change(given.spelled("flow_schedule_shift"), "objective.shift", 1.0, "0 shifts nothing there")
    given.drop(
        draft,
        dict.fromkeys(
            ("flow_schedule_shift", "flow_schedule_auto_shift", "flow_sigmoid_scale"), "not read beside the others"
        ),
    )


def _optimizer(draft: Draft, given: Settings) -> None:
    kind = given.take("optimizer", text, "adamw_bf16")
    ours = _OPTIMIZERS.get(kind) or ("adamw_8bit" if "adamw" in kind and "8bit" in kind else None)
    setting = given.spelled("optimizer") if "optimizer" in given else "optimizer is adamw_bf16"
    if ours:
        draft.move(setting, "optimizer.name", ours)
    else:
        draft.change(setting, "optimizer.name", "adamw", f"a recipe has no {kind!r}")
    given.move(draft, {"learning_rate": ("optimizer.lr", number)})
    norm = given.take("max_grad_norm", number, None)
    if norm is not None:
        draft.move(given.spelled("max_grad_norm"), "train.max_grad_norm", norm if norm > 0 else "none")
    warmup = given.take("lr_warmup_steps", integer, 0)
    setting = given.spelled("lr_scheduler") if "lr_scheduler" in given else "lr_scheduler is constant"
    common.put_schedule(
        draft,
        setting,
        given.take("lr_scheduler", text, "constant"),
        warmup,
        given.spelled("lr_warmup_steps") if warmup else "",
    )
    if given.take("use_ema", flag, False):
        draft.move(given.spelled("use_ema"), "ema.decay", given.take("ema_decay", number, 0.995))
    given.drop(draft, dict.fromkeys(("use_ema", "ema_decay"), "it is off"))


def _memory(draft: Draft, given: Settings) -> None:
    put_checkpointing(draft, given)
    bits = given.take("base_model_precision", text, "no_change")
    ours = _LOW_BITS.get(bits.split("-")[0])
    if ours and draft.method == "lora":
        draft.change(given.spelled("base_model_precision"), "memory.low_bit", ours, "the frozen weights of the blocks")
    elif "base_model_precision" in given:
        draft.drop(given.spelled("base_model_precision"), "frozen weights are held in train.precision")
    if given.take("ramtorch", flag, False):
        draft.change(given.spelled("ramtorch"), "memory.offload", True, "weights are in host memory, and streamed")
        if draft.gpus > 1 and draft.method == "lora":
            draft.put("memory.layout", "replicate")
    parts = [name for name in given.values if name.startswith("ramtorch_")]
    given.drop(draft, dict.fromkeys(parts, "memory.resident_blocks keeps some blocks on the GPU"))
    precision = given.take("mixed_precision", text, None)
    if precision:
        draft.move(given.spelled("mixed_precision"), "train.precision", "float32" if precision == "no" else "bf16")


def _validation(draft: Draft, given: Settings) -> None:
    height = str(given.take("validation_resolution", anything, "")).split(",")[0].strip().lower()
    size = [int(each) for each in height.split("x") if each.isdecimal()]
    length = given.take("validation_num_video_frames", integer, 1)
    prompt: dict[str, object] = {
        "text": given.take("validation_prompt", text, ""),
        "shape": Bucket(length, size[1], size[0]) if len(size) == 2 and min(*size, length) > 0 else None,
        "negative": given.take("validation_negative_prompt", text, ""),
        "steps": given.take("validation_num_inference_steps", integer, None),
        "guidance": given.take("validation_guidance", number, None),
        "seed": given.take("validation_seed", integer, None),
    }
    if prompt["text"]:
        common.put_prompts(draft, given.spelled("validation_prompt"), [prompt])
    every = "validation_step_interval" if "validation_step_interval" in given else "validation_steps"
    given.move(draft, {every: ("validation.samples_every", integer)})
    for name in ("resolution", "num_video_frames", "negative_prompt", "num_inference_steps", "guidance", "seed"):
        if f"validation_{name}" in given:
            draft.read(given.spelled(f"validation_{name}"), "it is in [[validation.prompts]]")
    report = given.take("report_to", text, "none")
    if report in ("wandb", "tensorboard"):
        draft.move(given.spelled("report_to"), "tracking.trackers", [report])
    elif "report_to" in given:
        draft.drop(given.spelled("report_to"), NOT_NEEDED["log"])
    given.move(draft, {"tracker_project_name": ("tracking.project", text), "tracker_run_name": ("tracking.name", text)})
