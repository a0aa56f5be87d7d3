"""Writes the account of the datasets as one HTML page that needs no other file and no network."""

import base64
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.preparation.account import Account, CaptionLengths, ClipAccount
from finetune.preparation.thumbnails import Thumbnails
from finetune.runtime.errors import Problem, harmless
from finetune.runtime.files import atomic

FILE = "dataset.html"
_TEMPLATES = Path(__file__).parent / "page_template"
_LISTED = 10_000  # clips; the figures count all of them
_NAMED = 1000  # files of one reason, and groups of copies
_CAPTION_BYTES = 3 * 10**6  # of all captions
_LONGEST_CAPTION, _SHORTEST_CAPTION = 600, 120  # bytes of a caption that are shown, of few clips and of many
_CAPTIONS = 3  # of one clip
_FIRST = 10  # of a list; the rest is folded
_LONGEST_NAME = 160

FILTERS = {
    "trimmed": "with unused frames",
    "cropped": "cropped",
    "enlarged": "enlarged",
    "repeated": "with repeated frames",
    "changed": "changed otherwise",
    "copy": "copies of others",
    "cut": "captions too long",
    "heldout": "held out",
    "failed": "without a picture",
}


def write_page(folder: Path, account: Account, pictures: Sequence[Thumbnails]) -> tuple[Path, int]:
    """Write the page into a folder, which is made if need be; returns its path and its size in bytes.

    Args:
        pictures: of `account.clips`, in their order.
    Raises:
        UserError: it cannot be written.
    """
    page = render(account, pictures).encode("utf-8", "backslashreplace")
    path = folder / FILE
    with atomic(path) as partial:
        partial.write_bytes(page)
    return path, len(page)


def render(account: Account, pictures: Sequence[Thumbnails]) -> str:
    """The page as HTML. Names and captions are escaped, and the page's policy lets no script run but its own."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # takes a tenth of a second

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "share": share,
        "seconds": seconds,
        "visible": harmless,
        "shorter": shorter,
        "name": lambda text: middle_cut(harmless(text), _LONGEST_NAME),
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
    }
    groups = _groups(account, pictures)
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        account=account,
        groups=groups,
        linked={bucket for bucket, _ in groups},
        totals=_totals(account),
        charts=[_chart(each) for each in account.captions],
        filters=_filters(account, pictures),
        refused=by_reason(_short(account, (problem for each in account.datasets for problem in each.refused))),
        unused=by_reason(_short(account, (problem for each in account.datasets for problem in each.unused))),
        caption_length=_caption_length(account),
        captions_shown=_CAPTIONS,
        named=_NAMED,
        first=_FIRST,
        listed=_LISTED,
        style=(_TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


# What the template shows


def _groups(account: Account, pictures: Sequence[Thumbnails]) -> list[tuple[Any, list[dict]]]:
    """(bucket, its clips that are listed, each with its picture and what is remarkable of it)."""
    cards: dict[Any, list[dict]] = {each.bucket: [] for each in account.buckets}
    for place, (clip, picture) in enumerate(zip(account.clips[:_LISTED], pictures, strict=False)):
        flags = _flags(account, clip, picture)
        card = {"place": place, "clip": clip, "picture": picture, "flags": flags, "kept": kept(clip)}
        cards.setdefault(clip.bucket, []).append(card)
    return [(bucket, of) for bucket, of in cards.items() if of]


def _flags(account: Account, clip: ClipAccount, picture: Thumbnails) -> list[str]:
    found = {
        "trimmed": clip.unused > 0,
        "cropped": clip.entry.fit.is_cropped,
        "enlarged": clip.entry.fit.is_enlarged,
        "repeated": clip.resampled.repeated > 0,
        "changed": bool(clip.entry.info.changes),
        "copy": bool(clip.copies),
        "cut": account.cut(clip) > 0,
        "heldout": clip.is_heldout,
        "failed": bool(picture.problems),
    }
    return [flag for flag, is_so in found.items() if is_so]


def _filters(account: Account, pictures: Sequence[Thumbnails]) -> list[tuple[str, str, int]]:
    """(flag, what it says, number of clips) of what is true of any clip."""
    flags = (flag for clip, each in zip(account.clips, pictures, strict=True) for flag in _flags(account, clip, each))
    counted = Counter(flags)
    return [(flag, text, counted[flag]) for flag, text in FILTERS.items() if counted[flag]]


def _totals(account: Account) -> dict[str, float]:
    trained = [clip for clip in account.clips if not clip.is_heldout]
    return {
        "trained": len(trained),
        "heldout": len(account.clips) - len(trained),
        "refused": sum(len(each.refused) for each in account.datasets),
        "unused": sum(len(each.unused) for each in account.datasets),
        "copies": sum(len(same) - 1 for same in account.copies),
        "samples": sum(each.samples for each in account.buckets),
        "frames": sum(each.samples * each.bucket.frames for each in account.buckets),
        "tokens": sum(each.samples * (each.tokens or 0) for each in account.buckets),
        "seconds": sum(clip.seconds for clip in trained),
    }


def _short(account: Account, problems: Iterable[Problem]) -> list[Problem]:
    """What is wrong with single files; of one dataset, without the path of its folder."""
    folders = [f"{each.path}{os.sep}" for each in account.datasets]
    prefix = folders[0] if len(folders) == 1 else ""
    return [replace(problem, where=problem.where.removeprefix(prefix)) for problem in problems]


def _caption_length(account: Account) -> int:
    """How many bytes of a caption are shown."""
    most = _CAPTION_BYTES // max(1, sum(min(len(clip.captions), _CAPTIONS) for clip in account.clips[:_LISTED]))
    return max(_SHORTEST_CAPTION, min(_LONGEST_CAPTION, most))


def kept(clip: ClipAccount) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the part of a clip's picture that its bucket shows, in shares of the picture's longer side."""
    info, scale = clip.entry.info, clip.entry.fit.enlarged
    longer = max(info.height, info.width)
    height, width = (side / scale / longer for side in (clip.bucket.height, clip.bucket.width))
    return (info.width / longer - width) / 2, (info.height / longer - height) / 2, width, height


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: lengths from `first` to `last`, or all from there on; `is_cut` where they are beyond the limit."""

    first: int
    last: int | None
    count: int
    is_cut: bool


def histogram(lengths: Sequence[int], limit: int | None, most: int = 32) -> list[Bar]:
    """How many captions are how long, in bars of one width, about `most` of them. The limit lies between two bars.

    The last bar has no end if there are a few captions that are much longer than all others.
    """
    if not lengths:
        return []
    ordered = sorted(lengths)
    usual = ordered[int(0.99 * (len(ordered) - 1))]  # one caption of a megabyte must not flatten all others
    end = max(int(1.25 * usual), int(1.25 * limit) if limit else 0, 8)
    step = next(m * 10**power for power in range(9) for m in (1, 2, 5) if end // (m * 10**power) < most)
    offset = limit % step + 1 - step if limit else 0  # at most 0; a bar begins at limit + 1
    counted = Counter((length - offset) // step for length in ordered)
    last = (end - offset) // step
    bars = []
    for place in range(last + 1):
        first, final = offset + place * step, offset + (place + 1) * step - 1
        is_cut = limit is not None and first > limit
        bars.append(Bar(max(0, first), final, counted[place], is_cut))
    if beyond := sum(count for place, count in counted.items() if place > last):
        bars.append(Bar(offset + (last + 1) * step, None, beyond, limit is not None))
    return bars


def _chart(lengths: CaptionLengths) -> dict[str, Any]:
    """What the template draws: bars, and how many captions are longer than the limit."""
    values = list(lengths.lengths.values())
    bars = histogram(values, lengths.limit)
    inside = sum(not bar.is_cut for bar in bars)
    return {
        "lengths": lengths,
        "bars": bars,
        "highest": max((bar.count for bar in bars), default=0),
        "limit_at": inside / len(bars) if bars and lengths.limit else None,
        "cut": sum(length > lengths.limit for length in values) if lengths.limit else 0,
        "longest": max(values, default=0),
        "median": sorted(values)[len(values) // 2] if values else 0,
    }


def by_reason(problems: Iterable[Problem]) -> list[tuple[str, str, list[str]]]:
    """(reason, cure, names) of files, the reason of most files first."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    for each in problems:
        names[each.what, each.cure].append(each.where)
    return sorted(((*reason, of) for reason, of in names.items()), key=lambda found: -len(found[2]))


# Texts and numbers


def shorter(text: str, most_bytes: int) -> str:
    """The beginning of a text, white space joined, with the text's length if there is more."""
    start = " ".join(text[: 4 * most_bytes].split())
    cut = start.encode("utf-8", "surrogateescape")[:most_bytes].decode("utf-8", "ignore")
    if len(cut) == len(start) and len(text) <= 4 * most_bytes:
        return harmless(start)
    return f"{harmless(cut)}… ({len(text):,} characters)"


def middle_cut(text: str, length: int) -> str:
    """A text without its middle if it is longer than `length`."""
    half = length // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


def number(value: float) -> str:
    """A count with separators of thousands; of fractions, one digit."""
    return f"{round(value):,}" if value == round(value) else f"{value:,.1f}"


def share(value: float) -> str:
    """A share in per cent."""
    percent = round(100 * value, 1)
    return f"{percent:.0f} %" if percent >= 10 or percent == round(percent) else f"{percent:.1f} %"


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value // 60)}:{int(value % 60):02d} min"
    return f"{int(value // 3600)}:{int(value // 60 % 60):02d} h"
