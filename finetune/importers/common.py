"""What several importers do alike: shapes and datasets, batches, schedules, epochs and validation prompts."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.importers.draft import Draft
from finetune.importers.families import legal_bucket, why_not
from finetune.importers.settings import Settings, integer
from finetune.recipe.bucket import Bucket

MEDIA = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif", ".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_PROMPT_DEFAULTS = ("count", "seed", "steps", "guidance", "fps")

NOT_NEEDED = {
    "tf32": "torch's own precision of float32 products is used; what is heavy is computed in bf16",
    "slicing": "clips are encoded one at a time anyway",
    "pin": "batches are pinned on a GPU anyway",
    "precompute": "clips and captions are always encoded once, into data.cache, and used again by later runs",
    "hub": "a finished run is pushed by its own command: python -m finetune push --run DIR --repo OWNER/NAME",
    "token": "the token of `hf auth login`, or HF_TOKEN, is taken",
    "log": "metrics lie in the run's folder",
    "resume": "the same command resumes from the newest checkpoint; --resume-step N goes back",
    "sample_offload": "samples are made by the transformer that is in training, sharded as it is",
    "half_encoders": "encoders are frozen and run once; they have train.precision",
}
"""Why settings that several trainers have are in no recipe."""


@dataclass
class ClipFolder:
    """One dataset of a source: where, how often its clips are taken, and its trigger word.

    `views` is in how many shapes an epoch has each clip there; a recipe has it in one.
    """

    path: str
    repeats: float = 1.0
    id_token: str = ""
    views: int = 1

    @property
    def times(self) -> float:
        """How often an epoch of the source has each clip."""
        return self.repeats * self.views


def put_buckets(draft: Draft, setting: str, buckets: Iterable[Bucket], text: str = "") -> None:
    """Set data.buckets, each as the model takes it; says which had to be moved."""
    given = list(dict.fromkeys(buckets))
    legal = list(dict.fromkeys(legal_bucket(draft, bucket) for bucket in given))
    moved = [f"{bucket} is {near}" for bucket in given if (near := legal_bucket(draft, bucket)) != bucket]
    if moved:
        text = "; ".join(filter(None, [text, f"{why_not(draft)}: {', '.join(moved)}"]))
    values = [str(bucket) for bucket in legal]
    if text:
        draft.change(setting, "data.buckets", values, text)
    else:
        draft.move(setting, "data.buckets", values)


def put_datasets(draft: Draft, setting: str, datasets: Sequence[ClipFolder]) -> None:
    """Set data.path, or [[data.sources]] for several; the same folder twice is one."""
    folders: dict[str, ClipFolder] = {}
    for dataset in datasets:
        folders.setdefault(dataset.path, dataset)
    if len(folders) < len(datasets):
        draft.todo.append(
            "a dataset was there several times, with another shape each; here a clip has one shape, the one that fits best"
        )
    found = list(folders.values())
    for each in found:
        _look_for(draft, each.path)
    used = [each for each in found if each.repeats > 0] or found
    if len(found) == 1:
        draft.move(setting, "data.path", found[0].path)
        if found[0].id_token:
            draft.put("data.id_token", found[0].id_token)
        if found[0].repeats != 1:
            draft.drop(
                f"repeats of {found[0].path}",
                "with one dataset they change nothing but the length of an epoch, which train.steps counts",
            )
        return
    sources = []
    for each in found:
        source: dict[str, object] = {"path": each.path}
        if each.repeats != 1:
            source["repeats"] = min(each.repeats, 1000) if each in used else 0
        if each.id_token:
            source["id_token"] = each.id_token
        sources.append(source)
    draft.move(setting, "data.sources", sources)


def _look_for(draft: Draft, path: str) -> None:
    """Say how a dataset that may be one on the Hub is fetched to where the recipe looks for it."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) and not Path(path).exists():
        fetch = f"hf download --repo-type dataset {path} --local-dir {path}"
        draft.todo.append(f"{path} is not here; if it is a dataset on the Hub, fetch it: {fetch}")


def put_batch(draft: Draft, setting: str, per_gpu: int, accumulation: int) -> None:
    """Set the batch: theirs is counted on each GPU and each pass, the recipe's is that of a whole step."""
    total = per_gpu * accumulation * draft.gpus
    parts = f"{per_gpu} a GPU x {accumulation} accumulated x {draft.gpus} GPU{'s' if draft.gpus > 1 else ''}"
    text = f"a recipe counts all samples of an optimizer step, over all GPUs: {parts}"
    draft.change(setting, "train.global_batch_size", total, text, parts)
    draft.put("train.micro_batch_size", per_gpu)


def put_script_batch(draft: Draft, given: Settings, option: str) -> None:
    """Set the batch by the two settings that diffusers' scripts have for it.

    Args:
        option: what stands before a setting's name where it is not given, "--" or nothing.
    """
    names = ("train_batch_size", "gradient_accumulation_steps")
    per_gpu, accumulation = (given.take(name, integer, default) for name, default in zip(names, (4, 1), strict=True))
    said = " ".join(given.spelled(name) for name in names if name in given)
    put_batch(draft, said or f"{option}train_batch_size is 4", max(1, per_gpu), max(1, accumulation))


def put_schedule(draft: Draft, setting: str, name: str, warmup: int, warmup_setting: str) -> None:
    """Set the learning rate's schedule and its warm-up, which "constant" has none of; call when train.steps is known."""
    known = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
    if name in known:
        draft.move(setting, "schedule.name", name)
    else:
        draft.change(
            setting, "schedule.name", "constant", f"a recipe has no schedule {name!r}; it has {', '.join(known)}"
        )
        name = "constant"
    if not warmup:
        return
    if name == "constant":
        draft.drop(warmup_setting, 'the schedule "constant" has no warm-up, there as here; "constant_with_warmup" has')
        return
    steps = int(draft.get("train.steps", 1000))
    if warmup > steps:
        draft.change(warmup_setting, "schedule.warmup_steps", steps, f"a run of {steps} steps has no more")
    else:
        draft.move(warmup_setting, "schedule.warmup_steps", warmup)


def put_epochs(draft: Draft, setting: str, epochs: float, datasets: Sequence[ClipFolder]) -> None:
    """Set train.steps from epochs: as many as there are clips for, if they can be counted."""
    batch = int(draft.get("train.global_batch_size", 1))
    used = [each for each in datasets if each.times > 0] or list(datasets)
    times = {each.times for each in used}
    if draft.clips:
        taken = draft.clips * sum(each.times for each in used) / max(1, len(used))
        clips = f"{draft.clips} clips" + (f" x {taken / draft.clips:g} in an epoch" if taken != draft.clips else "")
    else:
        taken = sum(_count(each.path) * each.times for each in datasets)
        clips = f"{taken:g} clips" if times <= {1} else f"{taken:g} clips, each as often as an epoch has it"
    if taken:
        steps = max(1, round(epochs * taken / batch))
        parts = f"{epochs:g} epochs x {clips} / batch of {batch}"
        draft.change(setting, "train.steps", steps, f"a recipe counts optimizer steps: {parts}", parts)
    else:
        draft.change(
            setting, "train.steps", 1000, "a recipe counts optimizer steps, and the clips are not here to be counted"
        )
        often = "" if times <= {1} else f" x {min(times):g}" if len(times) == 1 else " x how often an epoch has each"
        draft.todo.append(f"train.steps: set it to {epochs:g} x clips{often} / {batch}, or import again with --clips N")


def every_of_epochs(draft: Draft, epochs: float, total: float) -> int:
    """Steps between two events that were counted in epochs."""
    return max(1, round(int(draft.get("train.steps", 1000)) * min(1.0, epochs / max(total, 1e-9))))


def _count(path: str) -> int:
    """How many clips lie in a folder, or are lines of a list; 0 if it is not here."""
    place = Path(path).expanduser() if not path.startswith("~") or path.startswith("~/") else Path(path)
    try:
        if place.is_file() and place.suffix.lower() in (".jsonl", ".csv", ".tsv", ".txt"):
            lines = sum(1 for line in place.read_bytes().splitlines() if line.strip())
            return lines - (place.suffix.lower() in (".csv", ".tsv"))
        if place.is_dir():
            return sum(1 for each in place.rglob("*") if each.suffix.lower() in MEDIA)
    except OSError:
        return 0
    return 0


def put_prompts(draft: Draft, setting: str, prompts: Sequence[dict[str, object]], text: str = "") -> None:
    """Set [[validation.prompts]]: shapes as the model takes them; of image-to-video, only those with an image."""
    is_image = draft.family.endswith("_i2v")
    kept: list[dict[str, object]] = []
    moved = []
    for prompt in prompts:
        prompt = {key: value for key, value in prompt.items() if value not in (None, "")}
        if not prompt.get("text") or (is_image and not prompt.get("image")):
            continue
        if not is_image:
            prompt.pop("image", None)
        if isinstance(shape := prompt.get("shape"), Bucket):
            legal = legal_bucket(draft, shape)
            moved += [f"{shape} is {legal}"] if legal != shape else []
            prompt["shape"] = str(legal)
        kept.append(prompt)
    left = len(prompts) - len(kept)
    if left:
        why = "has no text, or no condition image, which this family needs"
        draft.drop(f"{left} of {len(prompts)} prompts of {setting}", f"{'it ' if left == 1 else 'each '}{why}")
    if moved:
        text = "; ".join(filter(None, [text, f"{why_not(draft)}: {', '.join(dict.fromkeys(moved))}"]))
    if not kept:
        return
    if text:
        draft.change(setting, "validation.prompts", kept, text)
    else:
        draft.move(setting, "validation.prompts", kept)


def put_every(draft: Draft, setting: str, key: str, steps: int, text: str = "") -> None:
    """Set after how many steps something happens; fewer than one is none."""
    if steps < 1:
        draft.drop(setting, "a recipe counts from one step on")
    elif text:
        draft.change(setting, key, steps, text)
    else:
        draft.move(setting, key, steps)
