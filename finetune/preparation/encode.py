"""Turns a dataset into items that are ready for training: inspects clips, assigns buckets and fills the cache.

Ranks share the work, and nothing is encoded twice. A run that was killed continues where it stopped.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from finetune.data.streams import Stream, caption_stream, file_stream, image_stream, video_stream
from finetune.engine.precision import DTYPES
from finetune.models import is_outside
from finetune.models.encoder import Encode, Encoder
from finetune.models.family import Family
from finetune.preparation.inspect import InspectedClip, inspect_clips, refuse_or_skip, require, split_heldout
from finetune.recipe import Recipe
from finetune.recipe.prompts import ResolvedPrompt, validation_prompts
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import Problem, UserError
from finetune.tracking.progress import ProgressLine

_ROUND = 4  # items that a rank encodes between two collectives, so that ranks wait little and errors show early
_COMMON_SOURCES = ("video", "caption")  # sources that every clip has
_LABELS = {"text": "encoding captions", "video": "encoding clips", "image": "reading images"}


@dataclass(frozen=True)
class PreparedPrompt:
    """A validation prompt, and the keys of its cached items."""

    prompt: ResolvedPrompt
    text_key: str
    negative_key: str
    image_key: str | None


@dataclass(frozen=True)
class Prepared:
    """What a run trains and validates on: items and prompts, and the cache that they are in."""

    cache: Cache
    train: list[Item]
    heldout: list[Item]
    unconditional_key: str
    prompts: list[PreparedPrompt]


@dataclass(frozen=True)
class _Encoding:
    """One item to encode, and the streams that its encoder takes. `note` says what it is made from, for people."""

    kind: str
    key: str
    note: str
    streams: tuple[Stream, ...]


@dataclass(frozen=True)
class _Kinds:
    """A family's encoders, and hashes of what their outputs depend on besides the clip; both by kind."""

    encoders: dict[str, Encoder]
    fingerprints: dict[str, str]

    def encoding(self, kind: str, streams: Mapping[str, Stream], note: str) -> _Encoding:
        """The item of one kind to encode from a clip's streams."""
        encoder = self.encoders[kind]
        taken = tuple(streams[name] for name in encoder.sources)
        identity = chain.from_iterable(stream.fingerprint for stream in taken)
        return _Encoding(kind, digest(kind, encoder.variant, self.fingerprints[kind], *identity), note, taken)

    def text(self, text: str) -> _Encoding:
        """The item to encode from a caption or prompt."""
        return self.encoding("text", {"caption": caption_stream(text)}, text)

    @property
    def further_sources(self) -> list[str]:
        """Names of the sources that encoders read besides video and caption. They are columns of the manifest."""
        named = chain.from_iterable(encoder.sources for encoder in self.encoders.values())
        return [name for name in dict.fromkeys(named) if name not in _COMMON_SOURCES]


def prepare(recipe: Recipe, family: Family, runtime: Runtime) -> Prepared:
    """Inspect the datasets and encode what the cache lacks. Collective; returns the same on every rank.

    Raises:
        UserError: lists everything that is wrong with the clips.
    """
    cache = Cache(recipe.data.cache)
    with runtime.together():
        if runtime.is_main:
            cache.sweep()
    kinds = _open_kinds(recipe, family, cache, runtime)
    usable = inspect_clips(recipe.data, recipe.data.path, cache, runtime)
    if named := recipe.validation.heldout:
        split = usable, inspect_clips(recipe.data, named, cache, runtime)
    else:
        split = split_heldout(usable, recipe)
    work: list[_Encoding] = []
    datasets = [list(_items(part, kinds, cache, runtime, work)) for part in split]
    if recipe.data.caption_dropout:
        work.append(kinds.text(""))
    prompts = _prompts(recipe, kinds, cache, runtime, work)

    if unusable := _encode(work, "image", lambda: _pixels, cache, runtime):
        raise UserError.of(unusable)
    failed: list[Problem] = []
    for kind, encoder in kinds.encoders.items():
        on_cpu = kind == "text" and recipe.memory.text_encoder == "cpu"
        device = torch.device("cpu") if on_cpu else runtime.device.torch_device
        failed += _encode(work, kind, partial(encoder.load, device), cache, runtime)
    broken = refuse_or_skip(failed, recipe.data.bad_clips, "encoded")
    train, heldout = ([item for item in items if str(item.path) not in broken] for items in datasets)
    require(train, recipe.data.path)
    _refuse_shared(train, heldout)
    return Prepared(cache, train, heldout, kinds.text("").key, prompts)


def _open_kinds(recipe: Recipe, family: Family, cache: Cache, runtime: Runtime) -> _Kinds:
    """List the family's encoders and hash their components, on rank 0 alone. Collective."""
    precision, name = recipe.train.precision, recipe.model.family
    own = [name] if is_outside(name) else []  # an outside family may encode otherwise with the same components
    encoders = {encoder.kind: encoder for encoder in family.encoders(DTYPES[precision], recipe.vae)}
    with runtime.together():
        hashed = (
            {kind: digest(*encoder.fingerprint(cache.file_hash), precision, *own) for kind, encoder in encoders.items()}
            if runtime.is_main
            else {}
        )
    return _Kinds(encoders, runtime.from_main(hashed))


def _items(
    clips: Sequence[InspectedClip], kinds: _Kinds, cache: Cache, runtime: Runtime, work: list[_Encoding]
) -> Iterator[Item]:
    """The items of clips. What has to be encoded for them is added to `work`. Collective."""
    with runtime.together():
        files = _further_files(clips, kinds.further_sources)
        hashes = {path: cache.file_hash(path) for path in files} if runtime.is_main else {}
    hashes = runtime.from_main(hashes)
    for entry in clips:
        clip, fit = entry.clip, entry.fit
        streams = {
            "video": video_stream(clip.path, entry.hash, entry.info, fit.bucket, fit.fps),
            "caption": caption_stream(clip.caption),
        }
        for name in kinds.further_sources:
            path = clip.file(name)
            streams[name] = file_stream(name, path, hashes[path])
        made = {}
        for kind, encoder in kinds.encoders.items():
            note = clip.caption if encoder.sources == ("caption",) else str(clip.path)
            work.append(kinds.encoding(kind, streams, note))
            made[kind] = work[-1].key
        yield Item(clip.path, clip.caption, fit.bucket, fit.fps, made, clip.columns)


def _further_files(clips: Sequence[InspectedClip], names: Sequence[str]) -> list[Path]:
    """The files that clips name in the columns `names`. Raises UserError that lists missing columns and files."""
    problems, files = [], []
    for clip, name in ((entry.clip, name) for entry in clips for name in names):
        if name not in clip.columns:
            problems.append(
                Problem(
                    f"the clip has no {name!r}, which this model is trained on",
                    clip.where,
                    f"add a column {name!r} with the path of its file",
                )
            )
        elif not clip.file(name).is_file():
            problems.append(Problem("no such file", f"{clip.file(name)} (from {clip.where})", "mend the path"))
        else:
            files.append(clip.file(name))
    if problems:
        raise UserError.of(problems)
    return list(dict.fromkeys(files))


def _prompts(
    recipe: Recipe, kinds: _Kinds, cache: Cache, runtime: Runtime, work: list[_Encoding]
) -> list[PreparedPrompt]:
    """The validation prompts. What has to be encoded for them is added to `work`. Collective."""
    with runtime.together():
        wanted = validation_prompts(recipe.validation, recipe.data.buckets[0]) if runtime.is_main else []
        contents = {prompt.image: _image_content(prompt.image, cache) for prompt in wanted if prompt.image}
    prompts = []
    wanted, contents = runtime.from_main((wanted, contents))
    for prompt in wanted:
        text, negative = kinds.text(prompt.text), kinds.text(prompt.negative)
        work += [text, negative]
        image_key = None
        if prompt.image:
            stream = image_stream(prompt.image, contents[prompt.image], prompt.shape)
            image_key = digest("image", *stream.fingerprint)
            work.append(_Encoding("image", image_key, prompt.image, (stream,)))
        prompts.append(PreparedPrompt(prompt, text.key, negative.key, image_key))
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


def _encode(
    work: Sequence[_Encoding], kind: str, load: Callable[[], Encode], cache: Cache, runtime: Runtime
) -> list[Problem]:
    """Encode the items of one kind that the cache lacks. Returns the problems of clips that cannot be decoded. Collective."""
    wanted = {entry.key: entry for entry in work if entry.kind == kind}
    missing = [key for key in wanted if not cache.has(kind, key)] if runtime.is_main else None
    missing = runtime.from_main(missing)
    if not missing:
        return []
    mine = missing[runtime.rank :: runtime.world_size]  # also among ranks that will train on the same samples
    problems: list[Problem] = []
    with runtime.together():
        encode = load() if mine else None
    rounds = -(-len(missing) // (runtime.world_size * _ROUND))
    with ProgressLine(_LABELS.get(kind, f"encoding {kind}"), len(missing), enabled=runtime.is_main) as progress:
        for turn in range(rounds):
            found: list[Problem] = []
            with runtime.together():
                for key in mine[turn * _ROUND : (turn + 1) * _ROUND]:
                    assert encode is not None  # loaded, since this rank has items
                    try:
                        tensors = encode(*(stream.read() for stream in wanted[key].streams))
                    except UserError as error:
                        found += error.problems
                        continue
                    cache.write(kind, key, tensors, wanted[key].note)
            for share in runtime.gather(found):
                problems += share
            progress.update(min(len(missing), (turn + 1) * _ROUND * runtime.world_size), "")
    del encode
    gc.collect()
    runtime.device.empty_cache()
    return problems
