"""cogvideox-factory, as finetrainers was called first: its four training scripts for CogVideoX."""

from collections.abc import Sequence
from itertools import product

from finetune.importers import common
from finetune.importers.common import NOT_NEEDED, ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.finetrainers import put_columns, put_common, put_model, put_optimizer, put_rates
from finetune.importers.finetrainers_extras import put_checkpointing, put_validation
from finetune.importers.launching import launched_gpus
from finetune.importers.settings import Settings, flag, from_arguments, integer, integers, number, text
from finetune.importers.sources import SettingsFile, commands, one_command
from finetune.recipe.bucket import Bucket
from finetune.runtime.errors import UserError

NAME = "cogvideox-factory"
READS = "a command or script that starts cogvideox_text_to_video_lora.py, or one of its three brothers"

_SCRIPT = r"cogvideox_(?:text|image)_to_video_(?:lora|sft)\.py"
_DROPPED = {
    "variant": "the weights that model.path has are taken",
    "cache_dir": "models are in the Hub's own cache (HF_HOME)",
    "load_tensors": NOT_NEEDED["precompute"],
    "random_flip": "clips are trained on as they are",
    "pin_memory": NOT_NEEDED["pin"],
    "validation_epochs": "set validation.samples_every, in steps",
    "use_dynamic_cfg": "samples are made by the diffusers pipeline as it is",
    "enable_model_cpu_offload": NOT_NEEDED["sample_offload"],
    "height": "height_buckets are read",
    "width": "width_buckets are read",
    "video_reshape_mode": "clips are scaled until they cover their bucket, and cut to it in the middle",
    "fps": "clips keep their own frame rate unless data.fps is set, there as here; it was for the samples' files",
    "max_num_frames": "frame_buckets are read",
    "skip_frames_start": "cut the clips themselves",
    "skip_frames_end": "cut the clips themselves",
    "resume_from_checkpoint": NOT_NEEDED["resume"],
    "scale_lr": "the rate is what you write; multiply it yourself",
    "enable_slicing": NOT_NEEDED["slicing"],
    "ignore_learned_positional_embeddings": "positions are as the checkpoint has them",
    "beta3": "Prodigy takes the root of the second beta",
    "prodigy_decouple": "weight decay is always decoupled",
    "prodigy_use_bias_correction": "Prodigy is taken without it",
    "prodigy_safeguard_warmup": "Prodigy is taken without it",
    "push_to_hub": NOT_NEEDED["hub"],
    "hub_model_id": NOT_NEEDED["hub"],
    "hub_token": NOT_NEEDED["token"],
    "logging_dir": NOT_NEEDED["log"],
    "allow_tf32": NOT_NEEDED["tf32"],
    "use_torchao": "the low bits are always torchao's",
}


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    return bool(commands(sources, _SCRIPT))


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    command = one_command(draft, commands(sources, _SCRIPT))
    given = from_arguments(command.arguments, command.source.file, NAME)
    draft.gpus = draft.gpus or launched_gpus(command.launcher)
    is_image, is_lora = "image_to_video" in command.name, "_lora" in command.name
    put_model(draft, given, "cogvideox")
    draft.change(f"the script {command.name}", "model.family", "cogvideox_i2v" if is_image else "cogvideox", "")
    draft.notes = [note for note in draft.notes if not note.setting.startswith("the script's name")]
    draft.move(f"the script {command.name}", "train.method", "lora" if is_lora else "full")
    given.move(draft, {"checkpoints_total_limit": ("checkpoint.keep_last", integer)})
    put_common(draft, given)
    datasets = _dataset(draft, given)
    _steps(draft, given, datasets)
    _optimizer(draft, given)
    put_checkpointing(draft, given)
    precision = given.take("mixed_precision", text, None)
    if precision in ("bf16", "no"):
        draft.move(given.spelled("mixed_precision"), "train.precision", "bf16" if precision == "bf16" else "float32")
    elif precision:
        draft.change(given.spelled("mixed_precision"), "train.precision", "bf16", f"a recipe has no {precision}")
    dropout = given.take("noised_image_dropout", number, None)
    if is_image:
        value = 0.05 if dropout is None else dropout
        setting = "--noised_image_dropout is 0.05" if dropout is None else given.spelled("noised_image_dropout")
        draft.move(setting, "data.image_dropout", value)
        draft.default("the condition image", "vae.image_noise", True, "there it always has noise before it is encoded")
    elif dropout is not None:
        draft.drop(given.spelled("noised_image_dropout"), "text-to-video has no condition image")
    put_validation(draft, given, sources, command.source.file)
    given.drop(draft, _DROPPED)
    given.name_the_rest(draft)


def _dataset(draft: Draft, given: Settings) -> list[ClipFolder]:
    root, file = given.take("data_root", text, ""), given.take("dataset_file", text, "")
    if not root and not file:
        raise UserError("the command names no --data_root", "add it", given.file)
    names = ("frame_buckets", "height_buckets", "width_buckets")
    every = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1280, 1536]
    lists = [given.take(name, integers, default) for name, default in zip(names, ([49], every, every), strict=True)]
    shapes = [Bucket(*shape) for shape in product(*lists) if min(shape) > 0]
    if not shapes:
        raise UserError(
            "the buckets have no shape", "set --frame_buckets, --height_buckets and --width_buckets", given.file
        )
    setting = " ".join(given.spelled(name) for name in names if name in given) or "the default buckets"
    text_ = (
        ""
        if len(shapes) == 1
        else f"each height with each width and length: {len(shapes)} shapes; a clip has the best of them"
    )
    common.put_buckets(draft, setting, shapes, text_)
    put_columns(draft, given)
    datasets = [
        ClipFolder(file if not root or file.startswith("/") else f"{root.rstrip('/')}/{file}" if file else root)
    ]
    common.put_datasets(draft, given.spelled("dataset_file" if file else "data_root"), datasets)
    return datasets


def _steps(draft: Draft, given: Settings, datasets: list[ClipFolder]) -> None:
    common.put_script_batch(draft, given, "--")
    steps, epochs = given.take("max_train_steps", integer, None), given.take("num_train_epochs", number, None)
    if steps is not None:
        draft.move(given.spelled("max_train_steps"), "train.steps", steps)
        given.drop(draft, {"num_train_epochs": "--max_train_steps goes before it, there as here"})
    else:
        setting = given.spelled("num_train_epochs") if epochs is not None else "--num_train_epochs is 1"
        common.put_epochs(draft, setting, epochs or 1, datasets)
    for name, key in (("checkpointing_steps", "checkpoint.every"), ("validation_steps", "validation.samples_every")):
        count = given.take(name, integer, None)
        if count is not None:
            common.put_every(draft, given.spelled(name), key, count)


def _optimizer(draft: Draft, given: Settings) -> None:
    name = given.take("optimizer", lambda value: str(value).lower(), "adam")
    bits = "_8bit" if given.take("use_8bit", flag, False) else "_4bit" if given.take("use_4bit", flag, False) else ""
    setting = given.spelled("optimizer") if "optimizer" in given else "--optimizer is adam"
    ours = {"adamw": f"adamw{bits}", "prodigy": "prodigy"}.get(name)
    ours = f"adamw{bits}" if bits and ours is None else ours
    put_optimizer(draft, given, setting, ours, name)
    for each in ("use_8bit", "use_4bit"):
        if each in given:
            draft.read(given.spelled(each), "it is in optimizer.name")
    given.move(draft, {"learning_rate": ("optimizer.lr", number)})
    if given.take("use_cpu_offload_optimizer", flag, False) and not bits and ours != "prodigy":
        gradients = given.take("offload_gradients", flag, False)
        is_one = draft.get("train.global_batch_size") == draft.get("train.micro_batch_size", 1) * draft.gpus
        where = "state_and_gradients" if gradients and is_one else "state"
        draft.change(
            given.spelled("use_cpu_offload_optimizer"), "optimizer.offload", where, "the update is made on the CPU"
        )
    given.drop(
        draft,
        {
            "use_cpu_offload_optimizer": "this optimizer's state stays on the GPU",
            "offload_gradients": "see optimizer.offload; gradients that are accumulated stay on the GPU",
        },
    )
    put_rates(draft, given)
