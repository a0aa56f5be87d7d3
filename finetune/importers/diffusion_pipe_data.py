"""What diffusion-pipe's TOMLs say of datasets, memory, evaluation and monitoring."""

from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import FPS, base_of, legal_area, legal_bucket, why_not
from finetune.importers.settings import Settings, anything, flag, integer, integers, number, text
from finetune.importers.sources import SettingsFile, beside
from finetune.recipe.bucket import Area, Bucket
from finetune.runtime.errors import UserError

_SHAPES = (
    "resolutions",
    "frame_buckets",
    "size_buckets",
    "enable_ar_bucket",
    "min_ar",
    "max_ar",
    "num_ar_buckets",
    "ar_buckets",
)
_ASPECTS = "shapes are found for the aspect ratios that the clips have"
_WINDOWS = {"single_beginning": "head", "single_middle": "centre", "multiple_overlapping": "all"}
_DROPPED = {
    "cache_shuffle_num": "captions are taken as they are; a clip may have several, see recipes/dataset.md",
    "cache_shuffle_delimiter": "captions are taken as they are",
    "shuffle_tags": "captions are taken as they are",
    "shuffle_metadata": "the order is shuffled in each epoch",
    "skip_empty_caption": "a clip without a caption is named, and data.bad_clips says what then happens",
    "online_captions": "captions are encoded once",
    "subsample_ratio": "write repeats = 0.25 for a quarter of the clips an epoch",
    "mask_path": "masks that weigh the loss lie beside the clips: see recipes/dataset.md",
    "default_mask_file": "masks that weigh the loss lie beside the clips: see recipes/dataset.md",
    "control_path": "no family here takes a control video",
}


def put_data(draft: Draft, dataset: Settings, given: Settings) -> list[ClipFolder]:
    """Set [data]; returns the datasets."""
    directories = dataset.tables("directory")
    if not directories:
        raise UserError("no [[directory]] in it", "add one, with its path", dataset.file)
    prefix = dataset.take("caption_prefix", text, "")
    if prefix:
        draft.read(
            dataset.spelled("caption_prefix"),
            "it is put before the captions of each directory as data.id_token, with a space",
        )
    everywhere = dataset.take("num_repeats", number, 1)
    found = []
    for directory in directories:
        path = directory.take("path", text, "")
        if not path:
            raise UserError("a [[directory]] has no path", "add it", dataset.file)
        own = directory.take("caption_prefix", text, prefix)
        if "caption_prefix" in directory:
            draft.read(directory.spelled("caption_prefix"), "it is data.id_token, which a space parts from the caption")
        repeats = directory.take("num_repeats", number, everywhere)
        sizes = directory.values.get("resolutions", dataset.values.get("resolutions"))
        views = max(1, len(sizes)) if isinstance(sizes, list) else 1  # of each resolution there is an item
        found.append(ClipFolder(path, repeats, own.strip().rstrip(","), views))
        for name in ("num_repeats", "path"):
            if name in directory and (len(directories) > 1 or name == "num_repeats"):
                draft.read(directory.spelled(name), "it is in [data]")
    common.put_datasets(draft, "directory.path", found)
    _shapes(draft, [*directories, dataset])
    fps = 24 if "TI2V-5B" in str(draft.get("model.path", "")) else FPS[base_of(draft.family)]
    draft.default(
        f"videos are resampled to {fps} a second", "data.fps", fps, "as they are there; unset, each keeps its own"
    )
    mode = given.take("video_clip_mode", text, None)
    if mode in _WINDOWS:
        draft.change(
            given.spelled("video_clip_mode"), "data.window", _WINDOWS[mode], "which frames of a longer clip are taken"
        )
    elif mode is not None:
        draft.drop(given.spelled("video_clip_mode"), "data.window is head, centre, random or all")
    given.move(draft, {"uncond_fraction": ("data.caption_dropout", number)})
    for each in [*directories, dataset]:
        each.drop(draft, _DROPPED)
        each.name_the_rest(draft)
    return found


def _shapes(draft: Draft, tables: Sequence[Settings]) -> None:
    """Set the shapes: as buckets where sizes are given, or as an area for which they are found."""
    first = {name: next((each for each in tables if name in each), None) for name in _SHAPES}
    setting = "; ".join(dict.fromkeys(each.spelled(name) for name, each in first.items() if each))
    values = {name: each.take(name, anything, None) if each else None for name, each in first.items()}
    several = any(len({repr(each.values[name]) for each in tables if name in each}) > 1 for name in _SHAPES)
    for each in tables:
        each.taken.update(_SHAPES)
    where = tables[-1].file
    sizes, lengths = (
        _lists(values["size_buckets"], where, "size_buckets"),
        _integers(values["frame_buckets"], where) or [1],
    )
    more = "one set of shapes for all directories" if several else ""
    if sizes:
        buckets = [Bucket(size[2] if len(size) > 2 else 1, size[1], size[0]) for size in sizes]
        common.put_buckets(draft, setting, buckets, "; ".join(filter(None, ["width x height x frames there", more])))
        return
    areas = _areas(values["resolutions"], where)
    if not areas:
        raise UserError("no resolutions and no size_buckets in it", "add resolutions = [512]", where)
    asked = first["enable_ar_bucket"]
    if asked and asked.take("enable_ar_bucket", flag, False):
        area = max(areas, key=lambda each: each.height * each.width)
        legal = [legal_bucket(draft, Bucket(length, *area)).frames for length in lengths]
        text_ = [_ASPECTS, more]
        if len(areas) > 1:
            text_.append("the largest resolution is taken; a clip has one shape, and not one for each resolution")
        if legal != lengths:
            text_.append(f"{why_not(draft)}: {lengths} are {legal}")
        text_.append(draft.put("data.frames", sorted(set(legal))))
        draft.change(setting, "data.area", str(legal_area(draft, area)), "; ".join(filter(None, text_)))
        counted = first["num_ar_buckets"]
        if counted and (count := counted.take("num_ar_buckets", integer, 0)) > 0:
            draft.put("data.bucket_count", count)
        return
    buckets = [Bucket(length, *area) for area in areas for length in lengths]
    common.put_buckets(
        draft, setting, buckets, "; ".join(filter(None, ["clips are cut to the shape that fits best", more]))
    )


def _areas(value: Any, where: str) -> list[Area]:
    try:
        areas = [Area(each[1], each[0]) if isinstance(each, list) else Area(each, each) for each in value or []]
        return [Area(integer(each.height), integer(each.width)) for each in areas if min(each) > 0]
    except (ValueError, TypeError, IndexError, OverflowError):
        raise UserError(
            f"resolutions = {value} are no sizes", "write resolutions = [512], or [[width, height]]", where
        ) from None


def _lists(value: Any, where: str, name: str) -> list[list[int]]:
    try:
        return [found for each in value or [] if min(found := integers(each)) > 0 and len(found) > 1]
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{name} = {value} are no sizes", f"write {name} = [[width, height, frames]]", where) from None


def _integers(value: Any, where: str) -> list[int]:
    try:
        return [each for each in integers(value or []) if each > 0]
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"frame_buckets = {value} are no lengths", "write frame_buckets = [1, 33]", where) from None


def put_memory(draft: Draft, given: Settings, model: Settings) -> None:
    """Set what is recomputed, held in few bits or in host memory, and compiled."""
    name = "activation_checkpointing"
    kind = given.take(name, anything, False)
    if kind == "unsloth":
        draft.change(
            given.spelled(name), "memory.activation_checkpointing", "full", "and what is kept goes to host memory"
        )
        draft.put("memory.offload_activations", True)
    elif kind:
        draft.change(given.spelled(name), "memory.activation_checkpointing", "full", "each block is recomputed")
    else:
        draft.default(
            f"{name} is off", "memory.activation_checkpointing", "none", "a recipe has it on unless it is said"
        )
    for name in ("transformer_dtype", "diffusion_model_dtype"):
        kind = model.take(name, text, "")
        if kind.startswith("float8") and draft.method == "lora":
            why = "the frozen weights of the blocks are held in float8, with a scale for each row"
            draft.change(model.spelled(name), "memory.low_bit", "float8", why)
        elif kind:
            draft.drop(model.spelled(name), "frozen weights are held in train.precision")
    kind = model.take("dtype", text, "")
    if kind:
        precision = "float32" if kind == "float32" else "bf16"
        draft.move(model.spelled("dtype"), "train.precision", precision)
    swapped = given.take("blocks_to_swap", integer, 0)
    if swapped and draft.method == "lora":
        why = f"all blocks take turns on the GPU, not {swapped} of them; memory.resident_blocks keeps some there, which is faster"
        draft.change(given.spelled("blocks_to_swap"), "memory.offload", True, why)
        if draft.gpus > 1:
            draft.put("memory.layout", "replicate")
    elif swapped:
        draft.drop(given.spelled("blocks_to_swap"), "it is for LoRA")
    if given.take("compile", flag, False):
        draft.change(given.spelled("compile"), "memory.compile", True, "each block is compiled by itself")
    each = "each part is taken from model.path"
    parts = (
        "llm_path",
        "clip_path",
        "vae_path",
        "vae",
        "text_encoders",
        "text_encoder_path",
        "byt5_path",
        "merge_adapters",
    )
    model.drop(draft, {**dict.fromkeys(parts, each), "cache_text_embeddings": "captions are always encoded once"})


def put_rest(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> None:
    """Set how the run is judged, and where its metrics go."""
    heldout = _heldout(draft, given, sources, file)
    every = given.take("eval_every_n_steps", integer, None)
    if every and heldout:
        common.put_every(draft, given.spelled("eval_every_n_steps"), "validation.every", every)
    elif every:
        draft.drop(
            given.spelled("eval_every_n_steps"),
            "there is no eval dataset; validation.heldout_clips = 4 takes some clips out",
        )
    given.drop(
        draft, {"eval_every_n_epochs": "set validation.every, in steps" if heldout else "there is no eval dataset"}
    )
    monitoring = given.table("monitoring")
    if monitoring.take("enable_wandb", flag, False):
        draft.change(
            monitoring.spelled("enable_wandb"), "tracking.trackers", ["wandb"], "log in once, by `wandb login`"
        )
        monitoring.take("wandb_tracker_name", text, "")
        for name, key in (("wandb_tracker_name", "tracking.project"), ("wandb_run_name", "tracking.name")):
            if value := monitoring.take(name, text, ""):
                draft.move(monitoring.spelled(name), key, value)
    off = "W&B is not on"
    names = ("enable_wandb", "wandb_api_key", "wandb_tracker_name", "wandb_run_name")
    monitoring.drop(draft, {**dict.fromkeys(names, off), "wandb_api_key": "log in once, by `wandb login`"})
    monitoring.name_the_rest(draft)


def _heldout(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> bool:
    entries: Any = given.take("eval_datasets", anything, None)
    if not isinstance(entries, list) or not entries:
        if "eval_datasets" in given:
            draft.drop(given.spelled("eval_datasets"), "it is empty")
        return False
    configs = [str(entry.get("config", "")) if isinstance(entry, dict) else str(entry) for entry in entries]
    source = beside(sources, configs[0], file)
    directories = source.data.get("directory", []) if source and isinstance(source.data, dict) else []
    paths = [each.get("path") for each in directories if isinstance(each, dict)]
    if not paths or not paths[0]:
        draft.drop(given.spelled("eval_datasets"), "it is not here to be read; set validation.heldout to its folder")
        return False
    more = "" if len(configs) == len(paths) == 1 else "a run has one held-out dataset: the first"
    draft.change(given.spelled("eval_datasets"), "validation.heldout", str(paths[0]), more)
    return True
