"""ai-toolkit: the YAML or JSON of a job, for the Wan models that it trains."""

from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import NOT_NEEDED, ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import FPS, base_of, family_named, legal_area, legal_bucket, why_not
from finetune.importers.settings import Settings, flag, integer, integers, number, text, words
from finetune.importers.sources import SettingsFile
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError

NAME = "ai-toolkit"
READS = "the YAML of a job, with config.process"

_ARCHES = {
    "wan21": "wan",
    "wan21_i2v": "wan_i2v",
    "wan22_14b": "wan",
    "wan22_14b_i2v": "wan_i2v",
    "wan22_5b": "wan",
    "ltx": "ltx",
}
_OPTIMIZERS = {
    "adamw": "adamw",
    "adamw8bit": "adamw_8bit",
    "adam8bit": "adamw_8bit",
    "lion": "lion",
    "prodigy": "prodigy",
}
_LOW_BITS = (("float8", "float8"), ("fp8", "float8"), ("4", "nf4"), ("", "int8"))
_SMALL = "it is a setting of its own interface, or changes nothing here"
_LOG = (
    "device",
    "performance_log_every",
    "logging",
    "sqlite_db_path",
    "type",
    "is_ui",
)


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    return any(_process(each.data) is not None for each in sources)


def _process(data: Any) -> dict[str, Any] | None:
    config = data.get("config") if isinstance(data, dict) else None
    processes = config.get("process") if isinstance(config, dict) else None
    first = processes[0] if isinstance(processes, list) and processes else None
    return first if isinstance(first, dict) else None


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    source = next(each for each in sources if _process(each.data) is not None)
    source.is_used = True
    draft.gpus = draft.gpus or 1
    given = Settings(_process(source.data) or {}, source.file, NAME)
    _model(draft, given.table("model"))
    _adapter(draft, given)
    name = source.data["config"].get("name")
    folder = given.take("training_folder", text, "output")
    setting = f"training_folder = {folder}; name = {name}" if name else f"training_folder = {folder}"
    draft.move(setting, "output", f"{folder.rstrip('/')}/{name}" if name else folder)
    trigger = given.take("trigger_word", text, "")
    if trigger:
        why = "put before every caption, also where the caption has it; [trigger] in captions is not replaced"
        draft.change(given.spelled("trigger_word"), "data.id_token", trigger, why)
    train = given.table("train")
    _data(draft, given, train)
    _training(draft, train)
    _saves(draft, given.table("save"))
    _samples(draft, given.table("sample"), trigger)
    given.drop(draft, dict.fromkeys(_LOG, _SMALL))
    given.name_the_rest(draft)


def _model(draft: Draft, model: Settings) -> None:
    path, arch = model.take("name_or_path", text, ""), model.take("arch", text, "")
    if not path:
        raise UserError("no name_or_path in model", "add it", f"{model.file}: model")
    family = _ARCHES.get(arch.split(":")[0]) or family_named(arch or "none", path, f"{model.file}: model.arch")
    draft.move(model.spelled("arch") if arch else "model.arch", "model.family", family)
    draft.move(model.spelled("name_or_path"), "model.path", path)
    if path.startswith("ai-toolkit/"):
        draft.todo.append(f"model.path: {path} is a copy of its own; the published checkpoint may serve as well")
    if model.take("quantize", flag, False):
        kind = model.take("qtype", text, "qfloat8")
        bits = next(ours for part, ours in _LOW_BITS if part in kind.split("|")[0])
        draft.change(
            model.spelled("quantize"),
            "memory.low_bit",
            bits,
            f"of {kind}: the frozen weights of the blocks, and no recovery adapter",
        )
    kwargs = model.table("model_kwargs")
    trained = [each for each in ("high", "low") if kwargs.take(f"train_{each}_noise", flag, True)]
    if "wan22_14b" in arch:
        draft.change(
            "model.model_kwargs",
            "model.experts",
            trained or ["high", "low"],
            "trained one after the other, each for train.steps",
        )
    kwargs.name_the_rest(draft)
    if model.take("low_vram", flag, False):
        draft.drop(
            model.spelled("low_vram"), "memory.offload = true streams the blocks; memory.offload_activations saves more"
        )
    model.drop(draft, dict.fromkeys(("quantize_te", "qtype_te"), NOT_NEEDED["half_encoders"]))
    model.drop(
        draft,
        {
            "qtype": "it is in memory.low_bit",
            "quantize": "it is off",
            "is_v_pred": "the checkpoint's objective is taken",
        },
    )
    model.name_the_rest(draft)


def _adapter(draft: Draft, given: Settings) -> None:
    if "network" not in given:
        draft.default("no network", "train.method", "full", "all weights are trained")
        return
    network = given.table("network")
    kind = network.take("type", text, "lora")
    if kind == "lora":
        draft.move("network.type = lora", "train.method", "lora")
    else:
        draft.change(network.spelled("type"), "train.method", "lora", f"{kind} cannot be trained here")
    rank = network.take("linear", integer, network.take("rank", integer, 4))
    draft.move(f"network.linear = {rank}", "lora.rank", rank)
    alpha = network.take("linear_alpha", number, network.take("alpha", number, None))
    if alpha is None:
        draft.default("network.linear_alpha is not set", "lora.alpha", 1, f"{NAME} takes 1")
    else:
        draft.move(f"network.linear_alpha = {alpha:g}", "lora.alpha", alpha)
    network.move(draft, {"dropout": ("lora.dropout", number)})
    network.drop(
        draft,
        dict.fromkeys(
            ("conv", "conv_alpha", "lokr_full_rank", "lokr_factor", "network_kwargs"),
            "linear layers of the blocks alone are trained",
        ),
    )
    network.name_the_rest(draft)


def _data(draft: Draft, given: Settings, train: Settings) -> None:
    entries = given.tables("datasets")
    if not entries:
        raise UserError("no datasets in it", "add one, with its folder_path", given.file)
    found, sides, lengths, dropouts = [], [], [], []
    for entry in entries:
        path = entry.take("folder_path", text, entry.take("dataset_path", text, ""))
        if not path:
            raise UserError("a dataset has no folder_path", "add it", given.file)
        found.append(ClipFolder(path, entry.take("num_repeats", number, 1), entry.take("trigger_word", text, "")))
        sides += entry.take("resolution", integers, [512])
        lengths.append(entry.take("num_frames", integer, 1))
        dropouts.append(entry.take("caption_dropout_rate", number, 0.0))
        if "num_frames" in entry and lengths[-1] > 1:
            why = "there they are spread over the whole clip; here they follow each other, at data.fps and as data.window says"
            draft.drop(entry.spelled("num_frames"), f"read into data.frames: {why}")
        for name in ("resolution", "num_repeats", "trigger_word", "caption_dropout_rate", "num_frames"):
            if name in entry and not (name == "num_frames" and lengths[-1] > 1):
                draft.read(entry.spelled(name), "it is in [data]")
        entry.drop(draft, {"caption_ext": "captions beside the clips are found by themselves"})
        cached = ("cache_latents", "cache_latents_to_disk", "cache_text_embeddings")
        entry.drop(draft, dict.fromkeys(cached, NOT_NEEDED["precompute"]))
        entry.drop(
            draft,
            dict.fromkeys(("shuffle_tokens", "token_dropout_rate", "keep_tokens"), "captions are taken as they are"),
        )
        entry.drop(
            draft,
            dict.fromkeys(
                ("flip_x", "flip_y", "augments", "random_crop", "random_scale"), "clips are taken as they are"
            ),
        )
        entry.drop(
            draft,
            dict.fromkeys(
                ("is_reg", "network_weight", "control_path", "mask_path", "do_i2v", "shrink_video_to_frames"),
                "a dataset here has no such key",
            ),
        )
        entry.drop(
            draft, {"buckets": "shapes are found by data.area", "bucket_tolerance": "shapes are found by data.area"}
        )
        entry.name_the_rest(draft)
    common.put_datasets(draft, "datasets.folder_path", found)
    side = max([each for each in sides if each > 0], default=512)
    legal = [legal_bucket(draft, Bucket(max(1, length), side, side)).frames for length in lengths]
    notes = [
        "the side of a square",
        "the largest of several" if len(set(sides)) > 1 else "",
        draft.put("data.frames", sorted(set(legal))),
    ]
    notes.append("" if legal == lengths else f"{why_not(draft)}: {lengths} are {legal}")
    draft.change(
        f"datasets.resolution = {sides}",
        "data.area",
        str(legal_area(draft, Area(side, side))),
        "; ".join(filter(None, notes)),
    )
    if max(legal) > 1:
        draft.default(
            "num_frames of a clip",
            "data.fps",
            FPS[base_of(draft.family)],
            "the model's rate, in place of frames spread over a clip",
        )
    if any(dropouts):
        draft.move(f"caption_dropout_rate = {dropouts[0]:g}", "data.caption_dropout", dropouts[0])


def _training(draft: Draft, train: Settings) -> None:
    accumulation = train.take("gradient_accumulation", integer, train.take("gradient_accumulation_steps", integer, 1))
    per_gpu = max(1, train.take("batch_size", integer, 1))
    common.put_batch(
        draft, f"train.batch_size = {per_gpu}; gradient_accumulation = {accumulation}", per_gpu, max(1, accumulation)
    )
    train.move(
        draft,
        {
            "steps": ("train.steps", integer),
            "lr": ("optimizer.lr", number),
            "max_grad_norm": ("train.max_grad_norm", number),
        },
    )
    kind = train.take("optimizer", text, "adamw").lower()
    ours = _OPTIMIZERS.get(kind)
    if ours:
        draft.move(f"train.optimizer = {kind}", "optimizer.name", ours)
    else:
        draft.change(f"train.optimizer = {kind}", "optimizer.name", "adamw", f"a recipe has no {kind!r}")
    parameters = train.table("optimizer_params")
    parameters.move(draft, {"weight_decay": ("optimizer.weight_decay", number)})
    parameters.name_the_rest(draft)
    common.put_schedule(draft, "train.lr_scheduler", train.take("lr_scheduler", text, "constant"), 0, "")
    if train.take("gradient_checkpointing", flag, True):
        draft.move("train.gradient_checkpointing = true", "memory.activation_checkpointing", "full")
    else:
        draft.move(train.spelled("gradient_checkpointing"), "memory.activation_checkpointing", "none")
    sampling = train.take("timestep_type", text, "sigmoid")
    known = {"sigmoid": "logit_normal", "linear": "uniform", "shift": "uniform"}
    why = "" if sampling in known else f"a recipe has no {sampling!r}; see objective.sigma_table"
    draft.change(
        f"train.timestep_type = {sampling}", "objective.sigma_sampling", known.get(sampling, "logit_normal"), why
    )
    if sampling in ("sigmoid", "linear", "weighted"):
        text_ = f'sigma is not shifted there with {sampling}; "scheduler" does what the checkpoint\'s scheduler does'
        draft.default("the shift of sigma", "objective.shift", 1.0, text_)
    ema = train.table("ema_config")
    if ema.take("use_ema", flag, False):
        draft.move("train.ema_config.use_ema", "ema.decay", ema.take("ema_decay", number, 0.999))
    ema.take("ema_decay", number, None)
    ema.name_the_rest(draft)
    precision = train.take("dtype", text, "bf16")
    draft.move(
        f"train.dtype = {precision}",
        "train.precision",
        "float32" if precision in ("float32", "fp32", "float") else "bf16",
    )
    each = "captions are encoded once, before the training"
    train.drop(draft, dict.fromkeys(("unload_text_encoder", "cache_text_embeddings", "train_text_encoder"), each))
    train.drop(
        draft,
        {"train_unet": "the transformer is what is trained", "noise_scheduler": "the checkpoint's objective is taken"},
    )
    train.drop(draft, {"switch_boundary_every": "experts are trained one after the other"})
    train.drop(
        draft,
        dict.fromkeys(
            ("skip_first_sample", "disable_sampling", "force_first_sample"), "samples are made where there are prompts"
        ),
    )
    train.drop(draft, {"content_or_style": "sigma is drawn as objective.sigma_sampling says"})
    train.name_the_rest(draft)


def _saves(draft: Draft, save: Settings) -> None:
    save.move(
        draft,
        {"save_every": ("checkpoint.every", integer), "max_step_saves_to_keep": ("checkpoint.keep_last", integer)},
    )
    save.drop(
        draft,
        {
            "dtype": "adapters are exported as export says; see recipes/adapters.md",
            "save_format": "see recipes/adapters.md",
        },
    )
    save.drop(draft, dict.fromkeys(("push_to_hub", "hf_repo_id", "hf_private"), NOT_NEEDED["hub"]))
    save.name_the_rest(draft)


def _samples(draft: Draft, sample: Settings, trigger: str) -> None:
    shape = [
        sample.take(name, integer, default) for name, default in (("num_frames", 1), ("height", 512), ("width", 512))
    ]
    shared = {
        "shape": Bucket(*shape) if min(shape) > 0 else None,
        "negative": sample.take("neg", text, ""),
        "seed": sample.take("seed", integer, None),
        "guidance": sample.take("guidance_scale", number, None),
        "steps": sample.take("sample_steps", integer, None),
        "fps": sample.take("fps", number, None),
    }
    written = sample.take("prompts", words, []) if isinstance(sample.values.get("prompts"), list) else []
    written += [each.take("prompt", text, "") for each in sample.tables("samples")]
    prompts: list[dict[str, object]] = [
        {"text": each.replace("[trigger]", trigger).strip(), **shared} for each in written
    ]
    if prompts:
        common.put_prompts(
            draft,
            "sample.prompts",
            prompts,
            "[trigger] is the trigger word" if "[trigger]" in " ".join(written) else "",
        )
    sample.move(draft, {"sample_every": ("validation.samples_every", integer)})
    sample.drop(
        draft,
        dict.fromkeys(
            ("sampler", "sample_start_step", "walk_seed", "format", "ext"),
            "samples are made by the diffusers pipeline, each with its seed",
        ),
    )
    sample.drop(draft, dict.fromkeys(("prompts", "samples"), "there are none"))
    sample.name_the_rest(draft)
