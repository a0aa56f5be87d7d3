"""The colours of a frame: which matrix, range, primaries and transfer it has, and how they become BT.709 RGB.

Ordinary video goes to 8 bits by way of swscale. Wide gamut and high dynamic range go to 16 bits, and are converted here:
swscale's own conversion of primaries (FFmpeg 8) is off by 5 to 7 of 255 where zscale and the definitions agree to 1.
"""

from dataclasses import dataclass
from functools import cache

import av
import numpy as np
from av.video.reformatter import Colorspace

_UNSPECIFIED = 2
# Numbers of ITU-T H.273.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_UNKNOWN_MATRICES = {8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "SMPTE 2085", 12: "chromaticity-derived"}
_UNKNOWN_MATRICES |= {13: "chromaticity-derived", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"}
_UNKNOWN_TRANSFERS = {8: "linear light", 9: "logarithmic (100:1)", 10: "logarithmic (316:1)", 17: "SMPTE 428"}
PQ, HLG = 16, 18
_GAMMAS = {4: 2.2, 5: 2.8, 13: 2.2}  # others are shown at BT.1886's gamma
_BT1886 = 2.4

_D65, _DCI = (0.3127, 0.3290), (0.314, 0.351)
_BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), _D65)
_WIDE = {
    9: ("BT.2020", ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65)),
    11: ("DCI-P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _DCI)),
    12: ("Display P3", ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65)),
}
_NARROW = ("BT.709", _BT709)
_HD_ROWS, _HD_COLUMNS = 720, 1280  # from here on players take untagged video for BT.709

_WHITE = 100.0  # cd/m2 of the white that standard video is mastered at; 1.0 of linear light here
_PEAK = 10.0  # the brightest light that is told from white: 1,000 cd/m2
_STEPS = 65535


@dataclass(frozen=True)
class Colours:
    """How the colours of frames are converted.

    Attributes:
        matrix: swscale's number of the matrix from YCbCr to RGB; None for RGB.
        primaries: H.273's number of wide primaries, or None.
        transfer: H.273's number of the transfer function.
        unknown: in words what cannot be converted, or "".
    """

    matrix: int | None
    primaries: int | None
    transfer: int
    unknown: str

    @property
    def is_hdr(self) -> bool:
        """Whether the transfer function is that of high dynamic range."""
        return self.transfer in (PQ, HLG)

    @property
    def is_wide(self) -> bool:
        """Whether more than a matrix is needed."""
        return self.is_hdr or self.primaries is not None

    @property
    def change(self) -> str:
        """What is done to the colours, in words; "" for ordinary video."""
        name = _WIDE[self.primaries][0] if self.primaries else _NARROW[0]
        if self.is_hdr:
            return f"tone-mapped from {'PQ' if self.transfer == PQ else 'HLG'}, {name}"
        return f"converted from {name}" if self.is_wide else ""


def colours_of(frame: av.VideoFrame) -> Colours:
    """Read a frame's colours from its tags, or guess as players do where there are none."""
    transfer = frame.color_trc
    wide = frame.color_primaries if frame.color_primaries in _WIDE else None
    if transfer in (PQ, HLG) and frame.color_primaries in (0, _UNSPECIFIED):
        wide = 9
    unknown = _UNKNOWN_TRANSFERS.get(transfer, "")
    if frame.format.is_rgb or frame.format.name.startswith(("pal", "gray", "mono", "ya", "xyz")):
        return Colours(None, wide, transfer, unknown)
    matrix = frame.colorspace
    if matrix in (0, 3, _UNSPECIFIED):
        is_hd = frame.height >= _HD_ROWS or frame.width >= _HD_COLUMNS
        matrix = 9 if wide == 9 else 1 if is_hd else 6
    return Colours(_MATRICES.get(matrix), wide, transfer, _UNKNOWN_MATRICES.get(matrix, unknown))


def to_bt709(pixels: np.ndarray, colours: Colours) -> np.ndarray:
    """Convert wide or bright colours to BT.709.

    As these filters of ffmpeg do, with a peak of 1,000 cd/m2: zscale=t=linear:npl=100:agamma=false, format=gbrpf32le,
    zscale=p=bt709, tonemap=hable:desat=0, zscale=t=bt709. What lies outside of BT.709's gamut is clipped.

    Args:
        pixels: uint16 (H, W, 3), RGB of the full range, as coded.
    Returns:
        uint8 (H, W, 3).
    """
    light = _linear(colours.transfer)[pixels]
    if colours.transfer == HLG:  # the reference display's system gamma of 1.2, BT.2100
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (_PEAK * np.maximum(luminance, 1e-9) ** np.float32(0.2))[..., None]
    light = light @ _to_bt709(colours.primaries).T
    if colours.is_hdr:
        brightest = np.maximum(light.max(-1), 1e-6)
        light *= (_hable(brightest) / (_hable(_PEAK) * brightest))[..., None]
    # The table is indexed by the square root, which spreads the dark values.
    steps = (np.sqrt(np.clip(light, 0, 1)) * _STEPS + 0.5).astype(np.uint16)
    return _coded(_BT1886 if colours.is_hdr else _GAMMAS.get(colours.transfer, _BT1886))[steps]


@cache
def _linear(transfer: int) -> np.ndarray:
    """Linear light of all 65,536 coded values: float32; 1.0 is standard white, of HLG the brightest scene light."""
    coded = np.linspace(0, 1, _STEPS + 1)
    if transfer == PQ:  # SMPTE ST 2084
        root = coded ** (32 / 2523)
        light = (np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)) ** (8192 / 1305) * 10000 / _WHITE
    elif transfer == HLG:  # ARIB STD-B67
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(coded <= 0.5, coded**2 / 3, (np.exp((coded - c) / a) + b) / 12)
    else:
        light = coded ** _GAMMAS.get(transfer, _BT1886)
    return light.astype(np.float32)


@cache
def _coded(gamma: float) -> np.ndarray:
    """uint8 values of all 65,536 square roots of linear light."""
    return (np.linspace(0, 1, _STEPS + 1) ** (2 / gamma) * 255 + 0.5).astype(np.uint8)


def _hable(light: np.ndarray | float) -> np.ndarray | float:
    """John Hable's filmic curve, with the constants of ffmpeg's tonemap filter."""
    a, b, c, d, e, f = 0.15, 0.50, 0.10, 0.20, 0.02, 0.30
    return (light * (light * a + b * c) + d * e) / (light * (light * a + b) + d * f) - e / f


@cache
def _to_bt709(primaries: int | None) -> np.ndarray:
    """Matrix of linear RGB between primaries, white adapted after Bradford: float32 (3, 3)."""
    if primaries is None:
        return np.eye(3, dtype=np.float32)
    source = _WIDE[primaries][1]
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    ratio = (bradford @ _xyz(_BT709[3])) / (bradford @ _xyz(source[3]))
    adapt = np.linalg.inv(bradford) @ np.diag(ratio) @ bradford
    return (np.linalg.inv(_rgb_to_xyz(_BT709)) @ adapt @ _rgb_to_xyz(source)).astype(np.float32)


def _rgb_to_xyz(primaries: tuple) -> np.ndarray:
    columns = np.stack([_xyz(point) for point in primaries[:3]], axis=1)
    return columns * np.linalg.solve(columns, _xyz(primaries[3]))


def _xyz(point: tuple[float, float]) -> np.ndarray:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])
