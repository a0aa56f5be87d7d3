"""From a dataset to items that are ready to be trained on: inspected, given a bucket, encoded into the cache.

Ranks share the work and never encode the same thing twice; a run that was killed continues where it stopped.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.data import decode
from finetune.data.cache import Cache, digest
from finetune.data.images import is_address, load_image, missing_image
from finetune.data.loader import Item
from finetune.engine.precision import DTYPES
from finetune.models.family import Family
from finetune.preparation.inspect import inspect_clips, refuse_or_skip, require, split_heldout
from finetune.recipe import Bucket, Recipe
from finetune.recipe.prompts import validation_prompts
from finetune.recipe.schema import Prompt
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.tracking.progress import ProgressLine

_ROUND = 4  # items a rank encodes between two meetings: bounds waiting, and errors surface early


@dataclass(frozen=True)
class PreparedPrompt:
    """A validation prompt, with its shape, and its files in the cache."""

    prompt: Prompt
    text_key: str
    negative_key: str
    image_key: str | None


@dataclass(frozen=True)
class Prepared:
    """The cache and what a run takes from it."""

    cache: Cache
    train: list[Item]
    heldout: list[Item]
    unconditional_key: str
    prompts: list[PreparedPrompt]


@dataclass(frozen=True)
class _Encoding:
    """A thing to encode: where it goes and, for a video or an image, what to decode."""

    kind: str
    key: str
    source: str
    bucket: Bucket | None = None
    item: Item | None = None
    info: decode.VideoInfo | None = None


def prepare(recipe: Recipe, family: Family, runtime: Runtime) -> Prepared:
    """Inspect the datasets and encode what the cache lacks. Collective; the same result on every rank.

    Raises:
        UserError: everything that is wrong with the clips, at once.
    """
    dtype = DTYPES[recipe.train.precision]
    cache = Cache(recipe.data.cache)
    with runtime.together():
        if runtime.is_main:
            cache.sweep()
    with runtime.together():
        fingerprints = _fingerprints(recipe, family, cache) if runtime.is_main else None
    text_fingerprint, video_fingerprint = runtime.from_main(fingerprints)

    def text_key(caption: str) -> str:
        return digest("text", family.pipeline_class, text_fingerprint, caption)  # whose encode_prompt it is

    usable = inspect_clips(recipe.data, recipe.data.path, cache, runtime)
    named = recipe.validation.heldout
    if named:
        split = usable, inspect_clips(recipe.data, named, cache, runtime)
    else:
        split = split_heldout(usable, recipe)
    work: list[_Encoding] = []
    datasets = []
    for part in split:
        items = []
        for clip, clip_hash, info, fitted in part:
            video = digest(
                "video", family.moments, video_fingerprint, clip_hash, str(fitted.bucket), fitted.fps, "head"
            )
            item = Item(clip.path, clip.caption, fitted.bucket, fitted.fps, video, text_key(clip.caption))
            items.append(item)
            work.append(_Encoding("text", item.text_key, clip.caption))
            work.append(_Encoding("video", video, str(clip.path), item.bucket, item, info))
        datasets.append(items)
    if recipe.data.caption_dropout:
        work.append(_Encoding("text", text_key(""), ""))
    with runtime.together():
        wanted = validation_prompts(recipe.validation, recipe.data.buckets[0]) if runtime.is_main else []
        images = [_image_key(prompt.image, prompt.shape, cache) if prompt.image else None for prompt in wanted]
    prompts = []
    for prompt, image in runtime.from_main(list(zip(wanted, images, strict=True))):
        prompts.append(PreparedPrompt(prompt, text_key(prompt.text), text_key(prompt.negative), image))
        work += [_Encoding("text", text_key(text), text) for text in (prompt.text, prompt.negative)]
        work += [_Encoding("image", image, prompt.image, prompt.shape)] if image else []

    if unusable := _encode(work, "image", lambda: _image_encoder, cache, runtime):
        raise UserError.of(unusable)
    failed = _encode(work, "text", lambda: _text_encoder(family, runtime, dtype, recipe), cache, runtime)
    failed += _encode(work, "video", lambda: _video_encoder(family, runtime, dtype, recipe), cache, runtime)
    broken = refuse_or_skip(failed, recipe.data.bad_clips, "encoded")
    train, heldout = ([item for item in items if str(item.path) not in broken] for items in datasets)
    require(train, recipe.data.path)
    trained = {item.video_key for item in train}
    if both := [
        Problem("this held-out clip is trained on, too", str(i.path)) for i in heldout if i.video_key in trained
    ]:
        raise UserError.of(both, "validation.heldout and data.path share clips; take them out of one:")
    return Prepared(cache, train, heldout, text_key(""), prompts)


def _fingerprints(recipe: Recipe, family: Family, cache: Cache) -> tuple[str, str]:
    """What the two encoders' outputs depend on besides the clip and the caption."""
    text = [family.folder.fingerprint(name, cache.file_hash) for name in family.text_components]
    video = [family.folder.fingerprint("vae", cache.file_hash), recipe.vae.tiling, recipe.vae.image_noise]
    return digest(text, family.pipeline_options, recipe.train.precision), digest(video, recipe.train.precision)


def _image_key(source: str, bucket: Bucket, cache: Cache) -> str:
    """A file by its content; an address by itself, so that it is fetched once."""
    if missing := missing_image(source):
        raise UserError.of([missing])
    content = source if is_address(source) else cache.file_hash(Path(source).expanduser())
    return digest("image", content, bucket.height, bucket.width)


Encode = Callable[[_Encoding], dict[str, torch.Tensor]]


def _text_encoder(family: Family, runtime: Runtime, dtype: torch.dtype, recipe: Recipe) -> Encode:
    device = torch.device("cpu") if recipe.memory.text_encoder == "cpu" else runtime.device.torch_device
    encode = family.text_encoder(device, dtype)
    return lambda work: encode(work.source)


def _video_encoder(family: Family, runtime: Runtime, dtype: torch.dtype, recipe: Recipe) -> Encode:
    encode = family.video_encoder(runtime.device.torch_device, dtype, recipe.vae)
    return lambda work: encode(decode.decode(work.item.path, work.info, work.item.bucket, work.item.fps))


def _image_encoder(work: _Encoding) -> dict[str, torch.Tensor]:
    return {"pixels": torch.from_numpy(load_image(work.source, work.bucket.height, work.bucket.width).copy())}


def _encode(
    work: Sequence[_Encoding], kind: str, load: Callable[[], Encode], cache: Cache, runtime: Runtime
) -> list[Problem]:
    """Encode what is missing of one kind; returns the problems of clips that break while they are decoded."""
    wanted = {entry.key: entry for entry in work if entry.kind == kind}
    missing = [key for key in wanted if not cache.has(kind, key)] if runtime.is_main else None
    missing = runtime.from_main(missing)
    if not missing:
        return []
    mine = missing[runtime.rank :: runtime.world_size]
    problems: list[Problem] = []
    with runtime.together():
        encode = load() if mine else None
    label = {"text": "encoding captions", "video": "encoding clips", "image": "reading images"}[kind]
    rounds = -(-len(missing) // (runtime.world_size * _ROUND))
    with ProgressLine(label, len(missing), enabled=runtime.is_main) as progress:
        for turn in range(rounds):
            found = []
            with runtime.together():
                for key in mine[turn * _ROUND : (turn + 1) * _ROUND]:
                    try:
                        tensors = encode(wanted[key])
                    except UserError as error:
                        found += error.problems
                        continue
                    cache.write(kind, key, tensors, wanted[key].source)
            for share in runtime.gather(found):
                problems += share
            progress.update(min(len(missing), (turn + 1) * _ROUND * runtime.world_size), "")
    del encode
    gc.collect()
    runtime.device.empty_cache()
    return problems
