"""How every picture of this project is drawn: its colours, its fonts, and matplotlib with both set."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import ImageFont

from finetune.runtime.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

# Told apart by those who see no red or no green, too: they differ in lightness. On a light and on a dark ground.
BLUE, ORANGE, GREEN, PURPLE, RED = "#2a66c8", "#d9771e", "#1f8a63", "#8557b8", "#b3261e"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED)
SERIES_ON_DARK = ("#79a7f7", "#f2a65e", "#5fcba0", "#c19bea", "#ff8a80")
TEXT, SOFT, LINE, FAINT = "#1c2127", "#5c6670", "#dfe3e8", "#c3cbd5"

_DPI = 120
_SETTINGS = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": True,
    "legend.framealpha": 0.85,
    "legend.edgecolor": "none",
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "text.color": TEXT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "savefig.dpi": _DPI,
}

_FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "/mnt/c/Windows/Fonts",  # WSL
)
_LATIN = ("NotoSans-Regular", "DejaVuSans", "LiberationSans-Regular", "Arial")
_CJK = (
    "NotoSansCJK",
    "NotoSansSC",
    "SourceHanSans",
    "wqy-",
    "DroidSansFallback",
    "PingFang",
    "Hiragino Sans",
    "msyh",
    "malgun",
    "NanumGothic",
    "ipag",
    "unifont",
)


@contextmanager
def drawing(what: str) -> Iterator[Any]:
    """matplotlib's pyplot with this project's style, without a screen; figures are closed at the end.

    Args:
        what: names the command or option in the error.
    Raises:
        UserError: matplotlib, the extra `plots`, is not installed.
    """
    check_matplotlib(what)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = ["DejaVu Sans", *_names_of_cjk_fonts()]
    with matplotlib.rc_context({**_SETTINGS, "font.family": families}):
        try:
            yield pyplot
        finally:
            pyplot.close("all")


def check_matplotlib(what: str) -> None:
    """Raises UserError if matplotlib, the extra `plots`, is not installed."""
    if find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed", 'in the checkout: pip install -e ".[plots]"', what)


@lru_cache
def font_files() -> tuple[Path, ...]:
    """Fonts of this machine for labels in pictures: one of Latin, Greek and Cyrillic, and one of Chinese, Japanese and Korean.

    Empty on a machine without any.
    """
    files = [file for folder in _FONT_FOLDERS for file in _fonts_in(Path(folder).expanduser())]
    if (spec := find_spec("matplotlib")) and spec.origin:  # which brings DejaVu
        files += _fonts_in(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf")
    latin = (file for name in _LATIN for file in files if file.stem == name)
    regular = sorted(files, key=lambda file: "Regular" not in file.stem)
    cjk = (file for name in _CJK for file in regular if file.name.startswith(name))
    return tuple(file for file in (next(latin, None), next(cjk, None)) if file is not None)


@lru_cache
def fonts(size: int) -> "tuple[FreeTypeFont | Any, ...]":
    """The fonts of `font_files` in a size of pixels, and at last the one that Pillow brings."""
    opened = []
    for file in font_files():
        try:
            opened.append(ImageFont.truetype(str(file), size))
        except OSError:  # a damaged file, or a form that this FreeType does not know
            continue
    return (*opened, ImageFont.load_default(size=size))


@lru_cache
def _names_of_cjk_fonts() -> tuple[str, ...]:
    """How matplotlib calls the font of Chinese, Japanese and Korean that this machine has; none if it has none."""
    from matplotlib import font_manager

    names = []
    for file in font_files():
        if file.name.startswith(_CJK):
            try:
                font_manager.fontManager.addfont(str(file))
                names.append(font_manager.FontProperties(fname=str(file)).get_name())
            except (OSError, RuntimeError):  # not a font that matplotlib reads
                continue
    return tuple(names)


def _fonts_in(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.rglob("*") if file.suffix.lower() in (".ttf", ".ttc", ".otf"))
    except OSError:
        return []
