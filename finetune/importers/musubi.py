"""musubi-tuner: the command that starts a network's training, or its --config_file, and the TOML of the datasets."""

from collections.abc import Sequence
from typing import Any

from finetune.importers import common
from finetune.importers.common import ClipFolder
from finetune.importers.draft import Draft
from finetune.importers.families import MODELS, published, put_experts, put_published
from finetune.importers.launching import launched_gpus
from finetune.importers.musubi_data import put_data
from finetune.importers.musubi_dropped import DROPPED
from finetune.importers.musubi_training import put_memory, put_objective, put_optimizer, put_samples
from finetune.importers.settings import Settings, from_arguments, integer, number, text, words
from finetune.importers.sources import SettingsFile, beside, commands, one_command
from finetune.runtime.errors import UserError

NAME = "musubi-tuner"
READS = "a command that starts wan_, hv_ or hv_1_5_train_network.py, and the TOML of its datasets"

_SCRIPT = r"(wan|hv|hv_1_5|fpack|flux_kontext|flux_2|qwen_image|zimage|kandinsky5|krea2)_train(?:_network)?\.py"


def fits(sources: Sequence[SettingsFile]) -> bool:
    """Whether the files are of this trainer."""
    return bool(commands(sources, _SCRIPT)) or any(
        isinstance(each.data, dict) and (_is_flat(each.data) or _is_dataset(each.data)) for each in sources
    )


def _is_flat(data: dict[str, Any]) -> bool:
    return "network_module" in _flattened(data)


def _is_dataset(data: dict[str, Any]) -> bool:
    datasets = data.get("datasets")
    names = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")
    return isinstance(datasets, list) and any(
        isinstance(each, dict) and any(name in each for name in names) for each in datasets
    )


def _flattened(data: dict[str, Any]) -> dict[str, Any]:
    """A --config_file's settings: its tables have no meaning there."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def convert(draft: Draft, sources: Sequence[SettingsFile]) -> None:
    """Fill the draft from the files."""
    given, script, file = _settings(draft, sources)
    _model(draft, given, script)
    draft.default("a script of networks", "train.method", "lora", "it trains an adapter")
    _names(draft, given)
    _adapter(draft, given)
    path = given.take("dataset_config", text, "")
    source = (beside(sources, path, file) if path else None) or next(
        (each for each in sources if isinstance(each.data, dict) and _is_dataset(each.data)), None
    )
    if source is None or not isinstance(source.data, dict):
        raise UserError(
            f"--dataset_config {path or 'NAME'} is not here",
            f"give it, too: finetune import {file} {path or 'dataset.toml'}",
            file,
        )
    source.is_used = True
    if path:
        draft.read(given.spelled("dataset_config"), "its datasets are in [data]")
    datasets, batch, setting = put_data(draft, Settings(source.data, source.file, NAME))
    _steps(draft, given, datasets, batch, setting)
    put_objective(draft, given)
    put_optimizer(draft, given)
    put_memory(draft, given)
    put_samples(draft, given, file)
    given.drop(draft, DROPPED)
    given.name_the_rest(draft)


def _settings(draft: Draft, sources: Sequence[SettingsFile]) -> tuple[Settings, str, str]:
    """The settings, the script's name ("" if it is not known), and where they stand."""
    found = commands(sources, _SCRIPT)
    if found:
        command = one_command(draft, found)
        draft.gpus = draft.gpus or launched_gpus(command.launcher)
        given = from_arguments(command.arguments, command.source.file, NAME)
        if path := given.take("config_file", text, ""):
            written = path if path.endswith(".toml") else f"{path}.toml"
            source = beside(sources, written, command.source.file)
            if source is None or not isinstance(source.data, dict):
                raise UserError(
                    f"--config_file {path} is not here", f"give it, too: finetune import {written}", command.source.file
                )
            given.values = {**_flattened(source.data), **given.values}
            draft.read(given.spelled("config_file"), "its settings are in the recipe")
        return given, command.name.rpartition("/")[2], command.source.file
    source = next((each for each in sources if isinstance(each.data, dict) and _is_flat(each.data)), None)
    if source is None:
        cure = "give the command, too: finetune import train.sh dataset.toml"
        raise UserError("the datasets alone, without the command that names model and training", cure, sources[0].file)
    source.is_used = True
    draft.gpus = draft.gpus or 1
    return Settings(_flattened(source.data), source.file, NAME, "--"), "", source.file


def _model(draft: Draft, given: Settings, script: str) -> None:
    module = given.values.get("network_module") or ""
    task = given.take("task", text, "")
    if script.startswith("hv_1_5") or "hv_1_5" in str(module):
        family = "hunyuan15"
    elif script.startswith("wan") or "lora_wan" in str(module):
        family = "wan"
    elif script.startswith("hv") or str(module).endswith("networks.lora"):
        family = "hunyuan"
    else:
        name = script or module
        raise UserError(
            f"{name} trains no model that can be trained here",
            "scripts of Wan, HunyuanVideo and 1.5 can be imported",
            given.file,
        )
    if any(part in task for part in ("-FC", "t2i", "i2i")):
        raise UserError(
            f"--task {task} is no model that can be trained here", "t2v and i2v tasks can be imported", given.file
        )
    weights = [given.take(name, text, "") for name in ("dit", "dit_high_noise")]
    is_image = "i2v" in task.lower() or "flf2v" in task.lower()
    draft.put("model.family", f"{family}_i2v" if is_image else family)
    setting = given.spelled("task") if task else script or f"network_module {module}"
    draft.move(setting, "model.family", draft.family)
    written = f"{task} {weights[0]}"
    name = published(draft.family, written)
    names = [each for each in ("dit", "dit_high_noise") if each in given]
    put_published(
        draft,
        " ".join(map(given.spelled, names)) or "--dit",
        name if name in MODELS else family,
        weights[0] or task or "the model",
    )
    low, high = given.take("min_timestep", number, None), given.take("max_timestep", number, None)
    if weights[1] and "A14B" in str(draft.get("model.path")):
        draft.change(
            given.spelled("dit_high_noise"),
            "model.experts",
            ["high", "low"],
            "they are trained one after the other, each for train.steps",
        )
    elif "A14B" in str(draft.get("model.path")):
        is_high = low is not None and low >= 500
        is_low = high is not None and high <= 950 and not is_high
        put_experts(draft, "high_noise" if is_high else "low_noise" if is_low else weights[0])


def _names(draft: Draft, given: Settings) -> None:
    folder, name = given.take("output_dir", text, ""), given.take("output_name", text, "")
    if folder or name:
        names = [each for each in ("output_dir", "output_name") if each in given]
        draft.move(" ".join(map(given.spelled, names)), "output", "/".join(filter(None, [folder.rstrip("/"), name])))
    given.move(draft, {"seed": ("train.seed", integer), "max_data_loader_n_workers": ("data.workers", integer)})
    for each, key in (("log_tracker_name", "tracking.project"), ("wandb_run_name", "tracking.name")):
        given.move(draft, {each: (key, text)})
    log = given.take("log_with", text, None)
    if log is not None:
        trackers = [each for each in ("tensorboard", "wandb") if log in (each, "all")]
        draft.move(given.spelled("log_with"), "tracking.trackers", trackers)


def _adapter(draft: Draft, given: Settings) -> None:
    module = given.take("network_module", text, "")
    if any(kind in module for kind in ("loha", "lokr")):
        draft.change(given.spelled("network_module"), "train.method", "lora", "LoHa and LoKr cannot be trained here")
    elif module:
        draft.read(given.spelled("network_module"), "an adapter on the linear layers of the blocks")
    rank, alpha = given.take("network_dim", integer, None), given.take("network_alpha", number, None)
    if rank is None:
        draft.default("--network_dim is not set", "lora.rank", 4, "musubi-tuner takes 4")
    else:
        draft.move(given.spelled("network_dim"), "lora.rank", rank)
    if alpha is None:
        why = f"musubi-tuner takes 1, which scales the adapter by 1/{rank or 4}; a recipe's own default is 64"
        draft.default("--network_alpha is not set", "lora.alpha", 1, why)
    elif alpha > 0:
        draft.move(given.spelled("network_alpha"), "lora.alpha", alpha)
    else:
        draft.change(given.spelled("network_alpha"), "lora.alpha", rank or 4, "0 stands for the rank there")
    given.move(draft, {"network_dropout": ("lora.dropout", number), "network_weights": ("lora.start_from", text)})
    for pair in given.take("network_args", words, []):
        name, _, value = pair.partition("=")
        if name == "loraplus_lr_ratio":
            draft.change(
                f"--network_args {pair}", "lora.plus_ratio", number(value), "LoRA+: the rate of the second matrices"
            )
        else:
            draft.drop(f"--network_args {pair}", "name what is trained in lora.targets, and its ranks in lora.ranks")
    paths, strengths = given.take("base_weights", words, []), given.take("base_weights_multiplier", words, [])
    if paths:
        scales = [float(each) for each in strengths] + [1.0] * len(paths)
        frozen = [{"path": path, "strength": scale} for path, scale in zip(paths, scales, strict=False)]
        draft.change(
            given.spelled("base_weights"),
            "lora.frozen",
            frozen,
            "they are added beside the base weights, not into them",
        )
    given.drop(draft, {"base_weights_multiplier": "it is in lora.frozen"})


def _steps(draft: Draft, given: Settings, datasets: list[ClipFolder], batch: int, setting: str) -> None:
    accumulation = max(1, given.take("gradient_accumulation_steps", integer, 1))
    name = "gradient_accumulation_steps"
    common.put_batch(
        draft, " ".join(filter(None, [setting, given.spelled(name) if name in given else ""])), batch, accumulation
    )
    epochs, steps = given.take("max_train_epochs", number, None), given.take("max_train_steps", integer, None)
    if epochs:
        common.put_epochs(draft, given.spelled("max_train_epochs"), epochs, datasets)
        if steps:
            draft.drop(given.spelled("max_train_steps"), "--max_train_epochs goes before it, there as here")
    elif steps:
        draft.move(given.spelled("max_train_steps"), "train.steps", steps)
    else:
        draft.default("--max_train_steps is not set", "train.steps", 1600, "musubi-tuner makes 1600")
    is_open = any(what.startswith("train.steps") for what in draft.todo)
    for by, key in (("save", "checkpoint.every"), ("sample", "validation.samples_every")):
        count, between = (
            given.take(f"{by}_every_n_steps", integer, None),
            given.take(f"{by}_every_n_epochs", number, None),
        )
        if count:
            common.put_every(draft, given.spelled(f"{by}_every_n_steps"), key, count)
        if between and (count or not epochs or is_open):
            draft.drop(given.spelled(f"{by}_every_n_epochs"), f"set {key}, in steps")
        elif between and epochs:
            common.put_every(
                draft,
                given.spelled(f"{by}_every_n_epochs"),
                key,
                common.every_of_epochs(draft, between, epochs),
                "steps are counted",
            )
    for name in ("save_last_n_steps", "save_last_n_epochs"):
        if name in given:
            given.take(name, integer, 0)
            draft.drop(given.spelled(name), "checkpoint.keep_last counts checkpoints")
