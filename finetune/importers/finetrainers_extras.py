"""The settings of finetrainers that concern memory and GPUs, and its validation prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.importers import common
from finetune.importers.draft import Draft
from finetune.importers.settings import Settings, flag, integer, number, text, words
from finetune.importers.sources import SettingsFile, beside
from finetune.recipe.bucket import Bucket
from finetune.recipe.validation import split_prompts
from finetune.runtime.errors import UserError

_READABLE = (".json",)


def put_memory(draft: Draft, given: Settings) -> None:
    """Set what is recomputed, held in few bits, compiled, and how weights lie on the GPUs."""
    put_checkpointing(draft, given)
    modules = given.take("layerwise_upcasting_modules", words, [])
    if "transformer" in modules and draft.method == "lora":
        why = "the frozen weights of the blocks are held in float8, with a scale for each row"
        draft.change(given.spelled("layerwise_upcasting_modules"), "memory.low_bit", "float8", why)
    elif modules:
        draft.drop(given.spelled("layerwise_upcasting_modules"), "with full finetuning no weight is frozen")
    compiled = given.take("compile_modules", words, [])
    if "transformer" in compiled:
        draft.change(
            given.spelled("compile_modules"), "memory.compile", True, "each block of the transformer is compiled"
        )
    elif compiled:
        draft.drop(given.spelled("compile_modules"), "only the transformer's blocks can be compiled")
    _put_layout(draft, given)


def put_checkpointing(draft: Draft, given: Settings) -> None:
    """Set whether blocks are recomputed: a flag that is off if it is not there."""
    is_on = given.take("gradient_checkpointing", flag, False)
    value = "full" if is_on else "none"
    if is_on:
        draft.move(given.spelled("gradient_checkpointing"), "memory.activation_checkpointing", value)
    else:
        why = "it is off there unless it is set, and a recipe has it on"
        draft.default("--gradient_checkpointing is not set", "memory.activation_checkpointing", value, why)


def _put_layout(draft: Draft, given: Settings) -> None:
    names = [name for name in ("dp_degree", "dp_shards") if name in given]
    replicas, shards = given.take("dp_degree", integer, 1), given.take("dp_shards", integer, 1)
    setting = " ".join(map(given.spelled, names))
    if names and shards > 1 and replicas > 1:
        draft.change(setting, "memory.layout", "hybrid", "shards within groups, replicas between them")
        draft.put("memory.shard_size", shards)
    elif names and max(shards, replicas) > 1:
        layout = "shard" if shards > 1 else "replicate"
        draft.change(setting, "memory.layout", layout, "torchrun --nproc_per_node says how many GPUs there are")
    elif names:
        draft.drop(setting, "torchrun --nproc_per_node says how many GPUs there are")
    for name in ("pp_degree", "tp_degree", "cp_degree"):
        if name in given:
            degree = given.take(name, integer, 1)
            why = (
                "1 is all there is"
                if degree == 1
                else 'samples are not divided over GPUs here; memory.layout = "shard" divides weights'
            )
            draft.drop(given.spelled(name), why)


def put_validation(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str) -> None:
    """Set the prompts: v0.0.1 has them in the command, the last release in a file of their own."""
    rate = given.take("validation_frame_rate", number, None)
    count = given.take("num_validation_videos", integer, None)
    separator = given.take("validation_separator", text, given.take("validation_prompt_separator", text, ":::"))
    name = "validation_prompts" if "validation_prompts" in given else "validation_prompt"
    if name in given:
        images = given.take("validation_images", text, "").split(separator)
        written = given.take(name, _sentence, "").replace(separator, ":::")
        prompts = split_prompts(written)
        for number_, prompt in enumerate(prompts):
            if "shape" in prompt:
                prompt["shape"] = _shape(prompt["shape"], f"{given.file}: --{name}")
            prompt["image"] = images[number_].strip() if number_ < len(images) else ""
            prompt["count"], prompt["fps"] = count if count and count > 1 else None, rate
            prompt["guidance"] = given.take("guidance_scale", number, None)
        common.put_prompts(draft, given.spelled(name), prompts)
    path = given.take("validation_dataset_file", text, "")
    if path:
        _put_file(draft, given, sources, file, path)
    read = (
        "validation_separator",
        "validation_prompt_separator",
        "num_validation_videos",
        "validation_frame_rate",
        "guidance_scale",
    )
    for each in (*read, "validation_images"):
        if each not in given:
            continue
        given.taken.add(each)
        if name in given:
            draft.read(given.spelled(each), "it is in [[validation.prompts]]")
        else:
            draft.drop(given.spelled(each), "there are no prompts that it is for")


def _sentence(value: Any) -> str:
    """text"""
    return " ".join(value) if isinstance(value, list) else text(value)


def _shape(written: str, where: str) -> Bucket:
    try:
        return Bucket.parse(written)
    except ValueError as error:
        what, _, cure = str(error).partition("; ")
        raise UserError(what, cure, where) from None


def _put_file(draft: Draft, given: Settings, sources: Sequence[SettingsFile], file: str, path: str) -> None:
    setting = given.spelled("validation_dataset_file")
    source = beside(sources, path, file) if Path(path).suffix in _READABLE else None
    if source is None:
        draft.drop(setting, "it is not here, or no JSON; write its prompts as [[validation.prompts]]")
        draft.todo.append(f"{path}: give it, too, or write its prompts as [[validation.prompts]]")
        return
    data = source.data
    entries = data.get("data") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise UserError(
            'there is no list "data" of prompts in it', "give the JSON of --validation_dataset_file", source.file
        )
    prompts, left = [], set()
    for number_, entry in enumerate(entries):
        prompt, unread = _prompt(Settings(entry, source.file, draft.trainer, f"data[{number_}]."))
        prompts.append(prompt)
        left |= unread
    for name in sorted(left):
        draft.drop(f"{name} of {path}", "a prompt here has no such key")
    common.put_prompts(draft, setting, prompts)


def _prompt(entry: Settings) -> tuple[dict[str, Any], set[str]]:
    """A prompt, and the names in its entry that have no place in one."""
    shape = [entry.take(name, integer, None) for name in ("num_frames", "height", "width")]
    prompt = {
        "text": entry.take("caption", text, entry.take("prompt", text, "")),
        "shape": Bucket(*(each for each in shape if each)) if all(each and each > 0 for each in shape) else None,
        "negative": entry.take("negative_prompt", text, ""),
        "steps": entry.take("num_inference_steps", integer, None),
        "guidance": entry.take("guidance_scale", number, None),
        "fps": entry.take("frame_rate", number, None),
        "image": entry.take("image_path", text, ""),
        "seed": entry.take("seed", integer, None),
    }
    return prompt, {name for name, value in entry.values.items() if value is not None and name not in entry.taken}
