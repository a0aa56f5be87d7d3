"""finetrainers, of its first release (v0.0.1) and of its last: a command or a script, with the JSON files that it names."""

import re
from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import NOT_NEEDED, ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import base_of, family_named
from finetune.importers.finetrainers_dropped import DROPPED
from finetune.importers.finetrainers_extras import put_memory, put_validation
from finetune.importers.launching import launched_gpus
from finetune.importers.settings import Settings, flag, from_arguments, integer, number, text, words
from finetune.importers.sources import SettingsFile, beside, commands, one_command
from finetune.recipe.bucket import Bucket
from finetune.runtime.errors import UserError

NAME = "finetrainers"
READS = "a command or script that starts train.py with --model_name, and its training.json"

_OPTIMIZERS = {"adamw": "adamw", "adamw-bnb": "adamw", "adamw-bnb-8bit": "adamw_8bit", "adam-bnb-8bit": "adamw_8bit"}
_REGEX_OF_NAMES = re.compile(r"[\w.|()*^]*?\.\*\(?([\w.|]+?)\)?\$?")


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    if commands(sources, r"train\.py", "--model_name"):
        return True
    return any(isinstance(each.data, dict) and _is_dataset(each.data) for each in sources)


def _is_dataset(data: dict[str, Any]) -> bool:
    datasets = data.get("datasets")
    return isinstance(datasets, list) and any(isinstance(each, dict) and "dataset_type" in each for each in datasets)


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    found = commands(sources, r"train\.py", "--model_name")
    if not found:
        cure = "give the script that starts train.py, too: finetune import train.sh training.json"
        raise UserError("the datasets alone, without the command that names model and training", cure, sources[0].file)
    command = one_command(draft, found)
    given = from_arguments(command.arguments, command.source.file, NAME)
    is_first = "dataset_config" not in given
    draft.gpus = draft.gpus or _data_parallel(given) or launched_gpus(command.launcher)
    put_model(draft, given, given.take("model_name", text, ""))
    _method(draft, given)
    put_common(draft, given)
    datasets = _datasets_v1(draft, given) if is_first else _datasets(draft, given, sources, command.source.file)
    _steps(draft, given, datasets, is_first)
    put_objective(draft, given)
    _optimizer(draft, given)
    put_memory(draft, given)
    put_validation(draft, given, sources, command.source.file)
    given.drop(draft, DROPPED)
    given.name_the_rest(draft)


def put_model(draft: Draft, given: Settings, name: str) -> None:
    """Set family and path."""
    path = given.take("pretrained_model_name_or_path", text, "")
    if not path:
        raise UserError("--pretrained_model_name_or_path is not there", "add it to the command", given.file)
    family = family_named(name, path, f"{given.file}: --model_name")
    setting = given.spelled("model_name") if "model_name" in given else f"the script's name ({name})"
    draft.move(setting, "model.family", family)
    given.move(draft, {"pretrained_model_name_or_path": ("model.path", text), "revision": ("model.revision", text)})


def _method(draft: Draft, given: Settings) -> None:
    kind = given.take("training_type", text, "lora")
    methods = {"lora": "lora", "full-finetune": "full"}
    if kind not in methods:
        cure = "lora and full-finetune can be imported"
        raise UserError(f"--training_type {kind} trains a control model, which no family here has", cure, given.file)
    setting = given.spelled("training_type") if "training_type" in given else "--training_type"
    draft.move(setting, "train.method", methods[kind])


def put_common(draft: Draft, given: Settings) -> None:
    """Set what has the same meaning in every release, and in the older scripts for CogVideoX."""
    given.move(
        draft,
        {
            "output_dir": ("output", text),
            "seed": ("train.seed", integer),
            "dataloader_num_workers": ("data.workers", integer),
            "tracker_name": ("tracking.project", text),
            "enable_tiling": ("vae.tiling", flag),
        },
    )
    if draft.method == "lora":
        given.move(draft, {"rank": ("lora.rank", integer), "lora_alpha": ("lora.alpha", number)})
        _targets(draft, given)
    else:
        given.drop(draft, dict.fromkeys(("rank", "lora_alpha", "target_modules"), "all weights are trained"))
    norm = given.take("max_grad_norm", number, None)
    if norm is not None:
        draft.move(given.spelled("max_grad_norm"), "train.max_grad_norm", norm if norm > 0 else "none")
    limit = given.take("checkpointing_limit", integer, None)
    if limit:
        draft.move(given.spelled("checkpointing_limit"), "checkpoint.keep_last", limit)
    if given.take("report_to", text, "none") in ("wandb", "tensorboard"):
        draft.move(given.spelled("report_to"), "tracking.trackers", [given.take("report_to", text, "")])
    elif "report_to" in given:
        draft.drop(given.spelled("report_to"), NOT_NEEDED["log"])
    timeout = given.take("nccl_timeout", number, None)
    if timeout is not None and timeout > 1800:
        why = "it is also how long a step may take"
        draft.change(given.spelled("nccl_timeout"), "distributed.timeout_seconds", timeout, why)
    elif timeout is not None:
        draft.drop(given.spelled("nccl_timeout"), "distributed.timeout_seconds is 1800, and holds for a whole step")


def _targets(draft: Draft, given: Settings) -> None:
    patterns = given.take("target_modules", words, None)
    default = ["to_q", "to_k", "to_v", "to_out.0"]
    if patterns is None:
        draft.default("--target_modules is not set", "lora.targets", default, "what finetrainers takes")
        return
    names: list[str] = []
    for pattern in patterns:
        if re.fullmatch(r"[\w.]+", pattern):
            names.append(pattern)
        elif match := _REGEX_OF_NAMES.fullmatch(pattern):
            names += match[1].split("|")
        else:
            why = f"{pattern!r} is no list of names; the family's own targets are taken, or name layers in lora.targets"
            draft.drop(given.spelled("target_modules"), why)
            return
    setting = given.spelled("target_modules")
    if names == patterns:
        draft.move(setting, "lora.targets", names)
    else:
        draft.change(setting, "lora.targets", names, "names of layers in place of a regular expression, in all blocks")


def _data_parallel(given: Settings) -> int:
    replicas, shards = given.take("dp_degree", integer, None), given.take("dp_shards", integer, None)
    return max(1, replicas or 1) * max(1, shards or 1) if replicas or shards else 0


def _datasets_v1(draft: Draft, given: Settings) -> list[ClipFolder]:
    """The dataset of v0.0.1, in the command itself."""
    root, file = given.take("data_root", text, ""), given.take("dataset_file", text, "")
    if not root and not file:
        cure = "add it, or --dataset_config of the last release"
        raise UserError("the command names no --data_root", cure, given.file)
    videos = given.take("video_resolution_buckets", words, [])
    images = given.take("image_resolution_buckets", words, [])
    buckets = [_bucket(given, each) for each in [*videos, *(f"1x{each}" for each in images)]]
    if not buckets:
        raise UserError("no --video_resolution_buckets", "add them, like 49x512x768", given.file)
    name = "video_resolution_buckets" if videos else "image_resolution_buckets"
    common.put_buckets(draft, given.spelled(name), buckets)
    put_columns(draft, given)
    if file:
        whole = file if not root or file.startswith(("/", "~")) else f"{root.rstrip('/')}/{file}"
        return _put(draft, given.spelled("dataset_file"), [ClipFolder(whole)])
    return _put(draft, given.spelled("data_root"), [ClipFolder(root)])


def put_columns(draft: Draft, given: Settings) -> None:
    """Set where videos and captions are named, the trigger word, and the dropout of captions."""
    given.move(draft, {"video_column": ("data.video_column", text), "id_token": ("data.id_token", text)})
    if "caption_column" in given:
        given.move(draft, {"caption_column": ("data.caption_column", text)})
    else:
        draft.default("--caption_column is not set", "data.caption_column", "text", "the column that is read there")
    dropout = given.take("caption_dropout_p", number, None)
    kind = given.take("caption_dropout_technique", text, "empty")
    if dropout is not None and kind == "empty":
        draft.move(given.spelled("caption_dropout_p"), "data.caption_dropout", dropout)
    elif dropout is not None:
        why = "there the embedding was set to zero; here the family's own unconditional prompt is taken"
        draft.change(given.spelled("caption_dropout_p"), "data.caption_dropout", dropout, why)
    given.drop(draft, {"caption_dropout_technique": "the family's own unconditional prompt is taken"})


def _put(draft: Draft, setting: str, datasets: list[ClipFolder]) -> list[ClipFolder]:
    common.put_datasets(draft, setting, datasets)
    return datasets


def _bucket(given: Settings, text_: str) -> Bucket:
    try:
        return Bucket.parse(text_.strip().lower())
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError(what, cure, f"{given.file}: --video_resolution_buckets") from None


def _datasets(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> list[ClipFolder]:
    """The datasets of the last release, in a JSON file of their own."""
    path = given.take("dataset_config", text, "")
    source = beside(sources, path, file)
    if source is None:
        cure = f"give it, too: finetune import {file} {path}"
        raise UserError(f"--dataset_config {path} is not here", cure, file)
    config = Settings(source.data if isinstance(source.data, dict) else {}, source.file, NAME)
    entries = config.tables("datasets")
    if not entries:
        raise UserError('there is no list "datasets" in it', "give the JSON of --dataset_config", source.file)
    draft.read(given.spelled("dataset_config"), "its datasets are in [data]")
    found, buckets = [], []
    for entry in entries:
        root, table = entry.take("data_root", text, ""), entry.take("dataset_file", text, "")
        if not root and not table:
            raise UserError('a dataset names no "data_root"', "add it", source.file)
        found.append(ClipFolder(table or root, id_token=entry.take("id_token", text, "")))
        for name in ("video_resolution_buckets", "image_resolution_buckets"):
            for each in entry.take(name, _shapes, []):
                buckets.append(Bucket(*([1] if len(each) == 2 else []), *each))
        entry.take("dataset_type", text, "")
        entry.move(
            draft, {"video_column": ("data.video_column", text), "caption_column": ("data.caption_column", text)}
        )
        entry.drop(draft, {"reshape_mode": DROPPED["video_reshape_mode"]})
        why = 'captions are trained on as they are; take phrases like "The video shows" out of them yourself'
        entry.drop(draft, {"remove_common_llm_caption_prefixes": why})
        entry.name_the_rest(draft)
    config.name_the_rest(draft)
    if not buckets:
        raise UserError('no "video_resolution_buckets" in it', "add them, like [[49, 512, 768]]", source.file)
    common.put_buckets(draft, "video_resolution_buckets", buckets)
    id_tokens = list(dict.fromkeys(each.id_token for each in found if each.id_token))
    common.put_datasets(draft, "data_root", found)
    if id_tokens:
        draft.move(f"id_token = {', '.join(id_tokens)}", "data.id_token", id_tokens[0])
        if len(id_tokens) > 1:
            del draft.values["data.id_token"]  # each source has its own
    return found


def _shapes(value: Any) -> list[list[int]]:
    """list of shapes, like [[49, 512, 768]]"""
    shapes = [[integer(side) for side in shape] for shape in value]
    if not all(len(shape) in (2, 3) and min(shape) > 0 for shape in shapes):
        raise ValueError
    return shapes


def _steps(draft: Draft, given: Settings, datasets: list[ClipFolder], is_first: bool) -> None:
    per_gpu, accumulation = given.take("batch_size", integer, 1), given.take("gradient_accumulation_steps", integer, 1)
    names = [name for name in ("batch_size", "gradient_accumulation_steps") if name in given]
    common.put_batch(draft, " ".join(map(given.spelled, names)) or "--batch_size is 1", per_gpu, max(1, accumulation))
    divisor = 1 if is_first else max(1, accumulation)
    why = (
        "there each pass counted as a step, also those that only accumulate; here optimizer steps count"
        if divisor > 1
        else ""
    )
    steps = given.take("train_steps", integer, None)
    epochs = given.take("train_epochs", number, None)
    if steps is not None:
        total = max(1, steps // divisor)
        if why:
            draft.change(given.spelled("train_steps"), "train.steps", total, why, f"{steps} passes / {divisor}")
        else:
            draft.move(given.spelled("train_steps"), "train.steps", total)
        given.drop(draft, {"train_epochs": "--train_steps goes before it, there as here"})
    elif is_first:
        setting = given.spelled("train_epochs") if epochs is not None else "--train_epochs is 1"
        common.put_epochs(draft, setting, epochs or 1, datasets)
    else:
        draft.default("--train_steps is not set", "train.steps", max(1, 1000 // divisor), "finetrainers makes 1000")
    for name, key in (("checkpointing_steps", "checkpoint.every"), ("validation_steps", "validation.samples_every")):
        count = given.take(name, integer, None)
        if count is not None:
            common.put_every(draft, given.spelled(name), key, max(1, count // divisor) if count > 0 else 0, why)
    total_epochs = epochs or 1
    every = given.take("validation_epochs", number, None)
    if every and "validation_steps" not in given:
        steps_between = common.every_of_epochs(draft, every, total_epochs) if steps is None else 0
        if steps_between:
            common.put_every(
                draft,
                given.spelled("validation_epochs"),
                "validation.samples_every",
                steps_between,
                "steps are counted",
            )
        else:
            draft.drop(given.spelled("validation_epochs"), "set validation.samples_every, in steps")


def put_objective(draft: Draft, given: Settings) -> None:
    """Set the noise levels: those of finetrainers are not shifted, whatever its settings say."""
    scheme = given.take("flow_weighting_scheme", text, "none")
    setting = (
        given.spelled("flow_weighting_scheme")
        if "flow_weighting_scheme" in given
        else "--flow_weighting_scheme is none"
    )
    curve = ("flow_logit_mean", "flow_logit_std", "flow_mode_scale")
    shift = given.take("flow_shift", number, None)
    if base_of(draft.family) == "cogvideox":
        why = "CogVideoX is trained by v-prediction, at timesteps drawn evenly, there as here"
        given.drop(draft, dict.fromkeys((*curve,), why))
        for name in ("flow_weighting_scheme", "flow_shift"):
            if name in given:
                draft.drop(given.spelled(name), why)
        return
    sampling = scheme if scheme in ("logit_normal", "mode") else "uniform"
    weighting = scheme if scheme in ("sigma_sqrt", "cosmap") else "none"
    if sampling == "logit_normal":
        draft.move(setting, "objective.sigma_sampling", sampling)
        given.move(
            draft,
            {"flow_logit_mean": ("objective.logit_mean", number), "flow_logit_std": ("objective.logit_std", number)},
        )
    elif sampling == "mode":
        draft.move(setting, "objective.sigma_sampling", sampling)
        given.move(draft, {"flow_mode_scale": ("objective.mode_scale", number)})
    else:
        draft.change(setting, "objective.sigma_sampling", sampling, "sigma is drawn evenly there")
    if weighting != "none":
        draft.change(setting, "objective.weighting", weighting, "the weight of the loss")
    given.drop(draft, dict.fromkeys(curve, f"the scheme {scheme} does not read it"))
    if shift is not None:
        why = f'it was never read there: sigma was not shifted. Set it to {shift:g}, or to "scheduler", to have it'
        draft.change(
            given.spelled("flow_shift"), "objective.shift", 1.0, why, 'as it was; the checkpoint\'s own: "scheduler"'
        )
    else:
        why = 'finetrainers does not shift sigma; "scheduler" does what the checkpoint\'s scheduler does, and is the better choice'
        draft.default("--flow_shift is not set", "objective.shift", 1.0, why)


def _optimizer(draft: Draft, given: Settings) -> None:
    name = given.take("optimizer", lambda value: str(value).lower(), "adam")
    setting = given.spelled("optimizer") if "optimizer" in given else "--optimizer is adam"
    put_optimizer(
        draft, given, setting, "adamw_8bit" if given.take("use_8bit_bnb", flag, False) else _OPTIMIZERS.get(name), name
    )
    if "use_8bit_bnb" in given:
        draft.read(given.spelled("use_8bit_bnb"), "it is in optimizer.name")
    given.move(draft, {"lr": ("optimizer.lr", number)})
    put_rates(draft, given)


def put_optimizer(draft: Draft, given: Settings, setting: str, ours: str | None, theirs: str) -> None:
    """Set the optimizer, and what it has of Adam."""
    if ours == theirs:
        draft.move(setting, "optimizer.name", ours)
    elif ours:
        draft.change(setting, "optimizer.name", ours, "the 8 bits are torchao's" if "8bit" in ours else "")
    else:
        draft.change(
            setting,
            "optimizer.name",
            "adamw",
            f"a recipe has no {theirs!r}: weight decay acts on the weights, not on the gradient",
        )
    betas = [given.take("beta1", number, 0.9), given.take("beta2", number, 0.95)]
    names = [name for name in ("beta1", "beta2") if name in given]
    draft.move(" ".join(map(given.spelled, names)) or "--beta1 0.9 --beta2 0.95", "optimizer.betas", betas)
    given.move(draft, {"weight_decay": ("optimizer.weight_decay", number), "epsilon": ("optimizer.eps", number)})


def put_rates(draft: Draft, given: Settings) -> None:
    """Set the schedule of the learning rate."""
    name = given.take("lr_scheduler", text, "constant")
    warmup = given.take("lr_warmup_steps", integer, None)
    setting = given.spelled("lr_scheduler") if "lr_scheduler" in given else "--lr_scheduler is constant"
    warmup_setting = given.spelled("lr_warmup_steps") if warmup is not None else "--lr_warmup_steps is 500"
    if warmup is None:
        warmup = 0 if name == "constant" else 500
    common.put_schedule(draft, setting, name, warmup, warmup_setting)
    if name == "cosine_with_restarts":
        given.move(draft, {"lr_num_cycles": ("schedule.cycles", integer)})
    if name == "polynomial":
        given.move(draft, {"lr_power": ("schedule.power", number)})
    given.drop(draft, dict.fromkeys(("lr_num_cycles", "lr_power"), f"the schedule {name} does not read it"))
