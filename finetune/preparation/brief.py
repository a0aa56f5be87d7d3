"""What becomes of the datasets in figures alone, as plain values that are kept with a run."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune.preparation.inspected import Inspection
from finetune.runtime.errors import Problem

_MOST_NAMED = 100  # problems of one dataset


def brief_of(inspected: Sequence[Inspection], heldout: str | None) -> list[dict[str, Any]]:
    """For each dataset: how many clips are used and in which bucket, what is lost of them, and what is refused or not used and why.

    Args:
        heldout: the dataset of held-out clips, if there is one of its own; it comes last.
    """
    return [
        _brief(each, is_heldout=heldout is not None and number == len(inspected))
        for number, each in enumerate(inspected, start=1)
    ]


def _brief(found: Inspection, is_heldout: bool) -> dict[str, Any]:
    clips = found.clips
    buckets = Counter(str(entry.fit.bucket) for entry in clips)
    return {
        "path": str(found.path),
        "heldout": is_heldout,
        "clips": len(clips),
        "images": sum(entry.clip.is_image for entry in clips),
        "samples": sum(entry.samples for entry in clips),
        "seconds": round(sum(0.0 if entry.clip.is_image else entry.info.duration for entry in clips), 3),
        "buckets": dict(sorted(buckets.items())),
        "trimmed": sum(entry.unused > 0 for entry in clips),
        "unused_frames": sum(entry.unused for entry in clips),
        "cropped": sum(entry.fit.is_cropped for entry in clips),
        "enlarged": sum(entry.fit.is_enlarged for entry in clips),
        "refused": _named([*found.problems, *found.unreadable]),
        "refused_count": len(found.problems) + len(found.unreadable),
        "unused": _named(found.unused),
        "unused_count": len(found.unused),
    }


def _named(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"where": each.where, "what": each.what} for each in problems[:_MOST_NAMED]]
