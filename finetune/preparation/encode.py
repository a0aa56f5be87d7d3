"""Turns a dataset into items that are ready for training: inspects clips, assigns buckets and fills the cache.

Ranks share the work, and nothing is encoded twice. A run that was killed continues where it stopped.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.data.cache import Cache, digest
from finetune.data.decode import DECODER, FORMER_DECODER
from finetune.data.images import is_address, missing_image
from finetune.data.loader import Item, Variant
from finetune.data.sources import (
    FRAMES,
    Piece,
    Source,
    caption_source,
    clip_sources,
    file_source,
    fitted_source,
    image_source,
    no_image_source,
)
from finetune.engine.precision import DTYPES
from finetune.models import code_of, is_outside
from finetune.models.encoder import Encoder
from finetune.models.family import Family
from finetune.preparation.brief import brief_of
from finetune.preparation.captions import CaptionCounter, captions_of, prompt_texts, say_cut_captions
from finetune.preparation.columns import frames_without_loss, further_columns, mask_encoder
from finetune.preparation.fill import Encoding, fill
from finetune.preparation.former import NOT_BEGUN, Begun, Names, as_begun, former_names, keeps_former
from finetune.preparation.inspect import Dataset, InspectedClip, inspect_data, refuse_or_skip, require, split_heldout
from finetune.recipe import Recipe
from finetune.recipe.prompts import ResolvedPrompt, validation_prompts
from finetune.runtime.distributed import Runtime, host_threads
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.paths import expanded


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
    """What a run trains and validates on: items and prompts, and the cache that they are in.

    `decoder` is the version of the decoder of clips, `former` has the keys by which an earlier one named items, and `datasets` what
    became of the clips of each dataset, see `brief_of`.
    """

    cache: Cache
    train: list[Item]
    heldout: list[Item]
    unconditional_key: str
    prompts: list[PreparedPrompt]
    former: Names = field(default_factory=dict)
    decoder: int = DECODER
    datasets: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Encoders:
    """A family's encoders by kind, and the digest of what their outputs depend on besides the clip.

    `background` is seen where images are transparent.
    """

    by_kind: dict[str, Encoder]
    fingerprints: dict[str, str]
    background: str

    def encoding(self, kind: str, sources: Mapping[str, Source], note: str) -> Encoding:
        """The item of a kind that is made of a clip's sources."""
        encoder = self.by_kind[kind]
        taken = tuple(sources[name] for name in encoder.sources)

        def key(identities: Iterable[tuple]) -> str:
            return digest(kind, encoder.variant, self.fingerprints[kind], *chain.from_iterable(identities))

        now = key(source.fingerprint for source in taken)
        former = None
        if any(source.former not in (None, source.fingerprint) for source in taken):
            former = key(source.former or source.fingerprint for source in taken)
        return Encoding(kind, now, note, taken, former)

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

    def sources(self, entry: InspectedClip, start: int) -> dict[str, Source]:
        """The sources of one piece of a clip, but for its caption.

        Args:
            start: the first frame of the piece, at the frame rate of training.
        """
        clip, piece = entry.clip, Piece(entry.fit.bucket, entry.fit.fps, start, entry.fit.former_fps)
        sources = clip_sources(clip, entry.hash, entry.info, piece, self.background)
        for column, found in entry.files.items():
            sources[column] = file_source(column, clip, found, entry.pictures.get(column), piece, self.background)
        return sources

    def encodings(self, entry: InspectedClip, start: int, captions: Sequence[str]) -> list[dict[str, Encoding]]:
        """The items of one piece of a clip by kind, for each of the captions. What is made without the caption, all share."""
        sources, path = self.sources(entry, start), str(entry.clip.path)
        kinds = [
            kind
            for kind, each in self.by_kind.items()
            if not each.optional or set(each.sources) <= {"caption", *sources}
        ]
        shared = {
            kind: self.encoding(kind, sources, path)
            for kind in kinds
            if kind != "text" and "caption" not in self.by_kind[kind].sources
        }
        made = []
        for caption in captions:
            told = {**sources, "caption": caption_source(caption)}
            notes = {kind: caption if kind == "text" else path for kind in kinds}
            made.append({kind: shared.get(kind) or self.encoding(kind, told, note) for kind, note in notes.items()})
        return made

    def items(self, entry: InspectedClip, alone: bool, heldout: bool = False) -> Iterator[tuple[Item, list[Encoding]]]:
        """What a clip is trained as, each with all that is encoded for it.

        Args:
            alone: whether captions are encoded without the clip's image, too.
            heldout: whether only the first is read of what takes turns.
        """
        clip, fit, starts = entry.clip, entry.fit, entry.windows.starts
        captions, first = clip.captions, 1 if heldout else None
        for turns in [starts[:first]] if entry.windows.take_turns else [(start,) for start in starts]:
            windows, work = [], []
            for start in turns:
                made = self.encodings(entry, start, captions[:first])
                by_itself = [self.text(caption) for caption in captions[:first]] if alone else []
                work += [*{id(each): each for of in made for each in of.values()}.values(), *by_itself]
                windows.append(
                    tuple(
                        Variant(caption, {kind: each.key for kind, each in of.items()}, text.key if text else None)
                        for caption, of, text in zip_longest(captions[:first], made, by_itself)
                    )
                )
            yield Item(clip.path, fit.bucket, fit.fps, tuple(windows), clip.columns, entry.source), work


def prepare(
    recipe: Recipe,
    family: Family,
    runtime: Runtime,
    cache: Cache | None = None,
    begun: Begun = NOT_BEGUN,
) -> Prepared:
    """Inspect the datasets and encode what the cache does not have yet. Collective; returns the same on every rank.

    Args:
        cache: another one than that of the recipe.
        begun: the run's checkpoints, which may keep clips as an earlier version decoded them, or refuse others.
    Raises:
        UserError: lists everything that is wrong with the clips.
    """
    cache = cache or Cache(recipe.data.cache)
    with runtime.together():
        if runtime.is_main:
            cache.sweep()
    encoders = _open_encoders(recipe, family, cache, runtime)
    listed = encoders.by_kind.values()
    unweighed = frames_without_loss(family, listed)
    dataset = inspect_data(recipe, cache, runtime, further_columns(listed), unweighed)
    drops_image = recipe.data.image_dropout > 0 and encoders.text_has_image
    items: dict[int, list[Item]] = {}
    work: list[Encoding] = []
    for part, alone in ((dataset.train, drops_image), (dataset.heldout, False)):
        for entry in part:
            made = list(encoders.items(entry, alone, heldout=part is dataset.heldout))
            items[id(entry)] = [item for item, _ in made]
            work += [each for _, encodings in made for each in encodings]
    items, work, names, decoder = _as_the_run_began(dataset, items, work, family, begun, cache, runtime)
    if recipe.data.caption_dropout or recipe.objective.guidance_target is not None:
        work.append(encoders.text(""))
    prompts = _prompts(recipe, family, encoders, cache, runtime, work)

    with runtime.together():
        if runtime.is_main:
            begun.check(cache, [item for entry in dataset.train for item in items[id(entry)]], names)
            # Of texts that are new to the cache: other starts have said it.
            new = {each.note for each in work if each.kind == "text" and not cache.path("text", each.key).exists()}
            captions = [
                *captions_of([*dataset.train, *dataset.heldout]),
                *prompt_texts(each.prompt for each in prompts),
            ]
            say_cut_captions([each for each in captions if each[1] in new], CaptionCounter(family))
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
    train, heldout = _without(failed.keys(), dataset, items, recipe)
    brief = brief_of(dataset.inspected, None if recipe.validation.heldout is None else str(recipe.validation.heldout))
    return Prepared(cache, train, heldout, encoders.text("").key, prompts, names, decoder, brief)


def _as_the_run_began(
    dataset: Dataset,
    items: dict[int, list[Item]],
    work: list[Encoding],
    family: Family,
    begun: Begun,
    cache: Cache,
    runtime: Runtime,
) -> tuple[dict[int, list[Item]], list[Encoding], Names, int]:
    """The items and what is to be encoded for them, by the decoder that the run goes on with. Collective.

    Args:
        items: those of each clip, by the `id` of its entry in the dataset.
    Returns:
        also the keys by which an earlier decoder named the items, and the decoder's version.
    """
    names = former_names(work)
    trained = [item for entry in dataset.train for item in items[id(entry)]]
    if not keeps_former(work, trained, family.columns, begun.earlier, cache, runtime):
        return items, work, names, DECODER
    rates = {id(entry): entry.fit.former_fps or entry.fit.fps for entry in (*dataset.train, *dataset.heldout)}
    items = {entry: [as_begun(item, names, rates[entry]) for item in its] for entry, its in items.items()}
    return items, [each for each in work if not each.former], {}, FORMER_DECODER


def _without(
    failed: Set[str], dataset: Dataset, items: Mapping[int, list[Item]], recipe: Recipe
) -> tuple[list[Item], list[Item]]:
    """What is trained on and what is held out, without clips of which an item has failed.

    Args:
        items: those of each clip, by the `id` of its entry in the dataset.
    """

    def sound(entries: Sequence[InspectedClip]) -> list[InspectedClip]:
        return [entry for entry in entries if all(failed.isdisjoint(item.all_keys) for item in items[id(entry)])]

    train, heldout = sound(dataset.train), sound(dataset.heldout)
    require(train, recipe.data.datasets[0].path)
    if recipe.validation.heldout:
        require(heldout, recipe.validation.heldout)
    elif recipe.validation.heldout_clips and not heldout:  # others take their place
        train, heldout = split_heldout(train, recipe)
    of_all = [[item for entry in part for item in items[id(entry)]] for part in (train, heldout)]
    return of_all[0], of_all[1]


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
    return _Encoders({each.kind: each for each in listed}, runtime.from_main(hashed), recipe.data.background)


def encoders_of(family: Family, recipe: Recipe) -> tuple[Encoder, ...]:
    """A family's encoders for a recipe, and that of masks, unless the family reads masks itself.

    Raises:
        UserError: their kinds are not as `Family.encoders` says.
    """
    encoders = family.encoders(DTYPES[recipe.train.precision], recipe.vae)
    kinds = [encoder.kind for encoder in encoders]
    if len(set(kinds)) < len(kinds) or not {"text", "video"} <= set(kinds) or not {"image", "mask"}.isdisjoint(kinds):
        raise UserError(
            f"{type(family).__name__}.encoders lists the kinds {', '.join(kinds)}",
            'list "text" and "video", each kind once, and none called "image" or "mask": the kinds of prompts\' images, and of '
            "masks that weigh the loss",
            "model.family",
        )
    if any("mask" in encoder.sources for encoder in encoders):
        return encoders
    return (*encoders, mask_encoder(family))


def _prompts(
    recipe: Recipe, family: Family, encoders: _Encoders, cache: Cache, runtime: Runtime, work: list[Encoding]
) -> list[PreparedPrompt]:
    """The validation prompts. What has to be encoded for them is added to `work`. Collective."""
    with runtime.together():
        wanted = validation_prompts(recipe.validation, recipe.data.sample_shape) if runtime.is_main else []
        contents = {image: _image_content(image, cache) for prompt in wanted for image in prompt.images}
    prompts = []
    wanted, contents = runtime.from_main((wanted, contents))
    for prompt in wanted:
        sources = [image_source(image, contents[image], encoders.background) for image in prompt.images]
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
    return source if is_address(source) else cache.file_hash(expanded(source))


def _pixels(image: np.ndarray) -> dict[str, Tensor]:
    return {"pixels": torch.from_numpy(image.copy())}
