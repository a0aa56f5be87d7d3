"""Turns a dataset into items that are ready for training: inspects clips, assigns buckets and fills the cache.

Ranks share the work, and nothing is encoded twice. A run that was killed continues where it stopped.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from finetune.data.cache import Cache, digest
from finetune.data.images import is_address, missing_image
from finetune.data.loader import Item
from finetune.data.sources import (
    FRAMES,
    Source,
    caption_source,
    file_source,
    fitted_source,
    frame_sources,
    image_source,
    no_image_source,
    video_source,
)
from finetune.engine.precision import DTYPES
from finetune.models import code_of, is_outside
from finetune.models.encoder import Encoder
from finetune.models.family import Family
from finetune.preparation.captions import captions_of, prompt_texts, say_cut_captions
from finetune.preparation.fill import Encoding, fill
from finetune.preparation.inspect import InspectedClip, inspect_clips, refuse_or_skip, require, split_heldout
from finetune.recipe import Recipe
from finetune.recipe.prompts import ResolvedPrompt, validation_prompts
from finetune.runtime.distributed import Runtime, host_threads
from finetune.runtime.errors import Problem, UserError


@dataclass(frozen=True)
class PreparedPrompt:
    """A validation prompt, and the keys of its cached items.

    Attributes:
        keys: kind -> key of what is encoded of the prompt and its images.
        negative_key: the negative prompt's text.
        image_keys: the pixels of the condition images, of the kind "image": none, the first, or the first and the last.
    """

    prompt: ResolvedPrompt
    keys: Mapping[str, str]
    negative_key: str
    image_keys: tuple[str, ...]


@dataclass(frozen=True)
class Prepared:
    """What a run trains and validates on: items and prompts, and the cache that they are in."""

    cache: Cache
    train: list[Item]
    heldout: list[Item]
    unconditional_key: str
    prompts: list[PreparedPrompt]


@dataclass(frozen=True)
class _Encoders:
    """A family's encoders by kind, and the digest of what their outputs depend on besides the clip."""

    by_kind: dict[str, Encoder]
    fingerprints: dict[str, str]

    def encoding(self, kind: str, sources: Mapping[str, Source], note: str) -> Encoding:
        """The item of a kind that is made of a clip's sources."""
        encoder = self.by_kind[kind]
        taken = tuple(sources[name] for name in encoder.sources)
        identity = chain.from_iterable(source.fingerprint for source in taken)
        return Encoding(kind, digest(kind, encoder.variant, self.fingerprints[kind], *identity), note, taken)

    def text(self, text: str) -> Encoding:
        """A caption or prompt by itself, without an image."""
        sources = {"caption": caption_source(text), **dict.fromkeys(FRAMES, no_image_source())}
        return self.encoding("text", sources, text)

    @property
    def text_has_image(self) -> bool:
        """Whether text is encoded with an image."""
        return not set(FRAMES).isdisjoint(self.by_kind["text"].sources)

    def prompt(self, text: str, images: Sequence[Source]) -> dict[str, Encoding]:
        """The items of a prompt and its images, by kind: of those that are made of no more."""
        sources = {"caption": caption_source(text), **dict(zip(FRAMES, images, strict=False))}
        made = {kind: each for kind, each in self.by_kind.items() if sources.keys() >= set(each.sources)}
        return {kind: self.encoding(kind, sources, text) for kind in made}

    def encodings(self, entry: InspectedClip) -> dict[str, Encoding]:
        """The items of a clip, by kind."""
        clip, fit = entry.clip, entry.fit
        sources = {
            "video": video_source(clip.path, entry.hash, entry.info, fit.bucket, fit.fps),
            "caption": caption_source(clip.caption),
            **frame_sources(clip.path, entry.hash, entry.info, fit.bucket, fit.fps),
        }
        for column, file_hash in entry.files.items():
            sources[column] = file_source(clip.file(column), file_hash, fit.bucket, fit.fps)
        notes = {kind: clip.caption if kind == "text" else str(clip.path) for kind in self.by_kind}
        return {kind: self.encoding(kind, sources, note) for kind, note in notes.items()}


def prepare(recipe: Recipe, family: Family, runtime: Runtime) -> Prepared:
    """Inspect the datasets and encode what the cache does not have yet. Collective; returns the same on every rank.

    Raises:
        UserError: lists everything that is wrong with the clips.
    """
    cache = Cache(recipe.data.cache)
    with runtime.together():
        if runtime.is_main:
            cache.sweep()
    encoders = _open_encoders(recipe, family, cache, runtime)
    columns = further_columns(encoders.by_kind.values())
    usable = inspect_clips(recipe.data, recipe.data.path, cache, runtime, columns)
    if named := recipe.validation.heldout:
        split = usable, inspect_clips(recipe.data, named, cache, runtime, columns)
    else:
        split = split_heldout(usable, recipe)
    work: list[Encoding] = []
    datasets: list[list[Item]] = []
    drops_image = recipe.data.image_dropout > 0 and encoders.text_has_image
    for part in split:
        datasets.append([])
        for entry in part:
            made = encoders.encodings(entry)
            work += made.values()
            keys = {kind: each.key for kind, each in made.items()}
            clip, fit = entry.clip, entry.fit
            alone = encoders.text(clip.caption) if drops_image and part is split[0] else None
            work += [alone] if alone else []
            text_alone = alone.key if alone else None
            datasets[-1].append(Item(clip.path, clip.caption, fit.bucket, fit.fps, keys, clip.columns, text_alone))
    if recipe.data.caption_dropout:
        work.append(encoders.text(""))
    prompts = _prompts(recipe, family, encoders, cache, runtime, work)

    with runtime.together():
        if runtime.is_main:  # of texts that are new to the cache: other starts have said it
            new = {each.note for each in work if each.kind == "text" and not cache.path("text", each.key).exists()}
            captions = [*captions_of(chain(*split)), *prompt_texts(each.prompt for each in prompts)]
            say_cut_captions([each for each in captions if each[1] in new], family)
    if unreadable := fill(work, "image", lambda: _pixels, cache, runtime):
        raise UserError.of(list(chain.from_iterable(unreadable.values())))
    failed: dict[str, list[Problem]] = {}
    for kind, encoder in encoders.by_kind.items():
        on_cpu = kind == "text" and recipe.memory.text_encoder == "cpu"
        device = torch.device("cpu") if on_cpu else runtime.device.torch_device
        with host_threads(runtime, used=on_cpu):
            failed |= fill(work, kind, partial(encoder.load, device), cache, runtime)
    texts = [encoders.text("").key, *chain.from_iterable((*each.keys.values(), each.negative_key) for each in prompts)]
    if needed := list(chain.from_iterable(failed[key] for key in dict.fromkeys(texts) if key in failed)):
        raise UserError.of(needed)  # no clip can be left out for it: the training would miss it later
    refuse_or_skip(list(chain.from_iterable(failed.values())), recipe.data.bad_clips, "encoded")
    train, heldout = (
        [(entry, item) for entry, item in zip(part, items, strict=True) if failed.keys().isdisjoint(item.all_keys)]
        for part, items in zip(split, datasets, strict=True)
    )
    require(train, recipe.data.path)
    if recipe.validation.heldout:
        require(heldout, recipe.validation.heldout)
    elif recipe.validation.heldout_clips and not heldout:  # others take their place
        items = {id(entry): item for entry, item in train}
        split = split_heldout([entry for entry, _ in train], recipe)
        train, heldout = ([(entry, items[id(entry)]) for entry in part] for part in split)
    trained, held = [item for _, item in train], [item for _, item in heldout]
    _refuse_shared(trained, held)
    return Prepared(cache, trained, held, encoders.text("").key, prompts)


def _open_encoders(recipe: Recipe, family: Family, cache: Cache, runtime: Runtime) -> _Encoders:
    """The family's encoders, their components hashed by rank 0. Collective."""
    precision = recipe.train.precision
    with runtime.together():
        listed = encoders_of(family, recipe)
        hashed = {}
        if runtime.is_main:
            # Code of this project changes the format's number; anybody else's is part of what an encoding depends on.
            code = []
            if is_outside(recipe.model.family):
                code = [
                    f"{type(family).__module__}:{type(family).__qualname__}",
                    *map(cache.file_hash, code_of(family)),
                ]
            hashed = {each.kind: digest(*each.fingerprint(cache.file_hash), precision, *code) for each in listed}
    return _Encoders({each.kind: each for each in listed}, runtime.from_main(hashed))


def encoders_of(family: Family, recipe: Recipe) -> tuple[Encoder, ...]:
    """A family's encoders for a recipe. Raises UserError if their kinds are not as `Family.encoders` says."""
    encoders = family.encoders(DTYPES[recipe.train.precision], recipe.vae)
    kinds = [encoder.kind for encoder in encoders]
    if len(set(kinds)) < len(kinds) or not {"text", "video"} <= set(kinds) or "image" in kinds:
        raise UserError(
            f"{type(family).__name__}.encoders lists the kinds {', '.join(kinds)}",
            'list "text" and "video", each kind once, and none called "image", which is that of prompts\' images',
            "model.family",
        )
    return encoders


def further_columns(encoders: Iterable[Encoder]) -> list[str]:
    """What encoders read besides video and caption: columns of the manifest."""
    named = chain.from_iterable(encoder.sources for encoder in encoders)
    return [name for name in dict.fromkeys(named) if name not in ("video", "caption", *FRAMES)]


def _prompts(
    recipe: Recipe, family: Family, encoders: _Encoders, cache: Cache, runtime: Runtime, work: list[Encoding]
) -> list[PreparedPrompt]:
    """The validation prompts. What has to be encoded for them is added to `work`. Collective."""
    with runtime.together():
        wanted = validation_prompts(recipe.validation, recipe.data.buckets[0]) if runtime.is_main else []
        contents = {image: _image_content(image, cache) for prompt in wanted for image in prompt.images}
    prompts = []
    wanted, contents = runtime.from_main((wanted, contents))
    for prompt in wanted:
        sources = [image_source(image, contents[image]) for image in prompt.images]
        shown = [fitted_source(source, family.condition_image, prompt.shape) for source in sources]
        made, negative = encoders.prompt(prompt.text, shown), encoders.text(prompt.negative)
        images = [
            Encoding("image", digest(*source.fingerprint), image, (source,))
            for image, source in zip(prompt.images, sources, strict=True)
        ]
        work += [*made.values(), negative, *images]
        keys = {kind: each.key for kind, each in made.items()}
        prompts.append(PreparedPrompt(prompt, keys, negative.key, tuple(image.key for image in images)))
    return prompts


def _image_content(source: str, cache: Cache) -> str:
    """What identifies an image in its cache key: the hash of a file, or an address, so that an address is fetched only once."""
    if missing := missing_image(source):
        raise UserError.of([missing])
    return source if is_address(source) else cache.file_hash(Path(source).expanduser())


def _pixels(image: np.ndarray) -> dict[str, Tensor]:
    return {"pixels": torch.from_numpy(image.copy())}


def _refuse_shared(train: Sequence[Item], heldout: Sequence[Item]) -> None:
    trained = {item.keys["video"] for item in train}
    if both := [
        Problem("this held-out clip is trained on, too", str(item.path))
        for item in heldout
        if item.keys["video"] in trained
    ]:
        raise UserError.of(both, "validation.heldout and data.path share clips; take them out of one:")
