"""The documents: their links lead somewhere, their paragraphs are short, and what is generated in them is current."""

import re
from pathlib import Path

import pytest
from PIL import Image
from processes import ROOT

from finetune.commands.schema import key_tables

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "recipes").glob("*.md"), *(ROOT / "finetune").glob("*.md")])
DOCUMENTS += sorted([*(ROOT / "benchmarks").glob("*.md"), *(ROOT / "launch").glob("*.md")])
OTHERS = {"CHANGELOG.md"}  # lists
LONGEST = 5  # lines of a paragraph


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def without_code(text: str) -> str:
    return re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """What GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each.name not in OTHERS], ids=name_of)
def test_paragraphs_are_short(document: Path) -> None:
    for paragraph in re.split(r"\n\s*\n", without_code(document.read_text())):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        is_text = lines and not lines[0].lstrip().startswith(("|", "#", "-", "<", *"123456789"))
        assert not is_text or len(lines) <= LONGEST, paragraph


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


def test_the_first_pages_picture_moves_and_is_small() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert (ROOT / picture).stat().st_size <= 1_000_000
    with Image.open(ROOT / picture) as moving:
        assert moving.n_frames > 1


def test_every_key_is_in_the_tables_of_keys() -> None:
    assert "\n".join(key_tables()).strip() in (ROOT / "recipes" / "README.md").read_text()
