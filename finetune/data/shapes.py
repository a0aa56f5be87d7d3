"""Draws coloured shapes that move over plain floors, and tells which shape, colour and direction a clip shows.

The demo's pipeline is trained on such clips, the quickstart teaches it a shape that it has not seen, and `seen` judges both.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

COLOURS = {
    "red": (220, 50, 45),
    "green": (50, 180, 75),
    "blue": (50, 90, 220),
    "yellow": (245, 205, 45),
    "purple": (150, 60, 190),
    "orange": (245, 130, 40),
    "white": (238, 238, 238),
    "cyan": (60, 205, 215),
}
FLOORS = {"black": (18, 18, 22), "grey": (95, 97, 102), "brown": (88, 60, 42), "navy": (22, 28, 70)}
SHAPES = ("ball", "square", "triangle", "cross")
NEW_SHAPE = "ring"  # which the demo's transformer has not seen
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES, HEIGHT, WIDTH = 17, 64, 96
CAPTIONS = (
    "a {colour} {shape} moves {direction} over a {floor} floor",
    "a {colour} {shape} is moving {direction} over a {floor} floor",
    "the {colour} {shape} goes {direction} on the {floor} floor",
    "{floor} floor, a {colour} {shape} moving {direction}",
)
_LEAST_OVERLAP = 0.6  # of a shape with its drawing: intersection over union
_LEAST_HOLE = 0.06  # of a ring's area; 0.29 as it is drawn
_SECTORS = 12  # around the middle, of which a ring fills nine at least
_TRIANGLES_CENTROID = 0.034  # of its size, below the middle of its drawing


@dataclass(frozen=True)
class Scene:
    """A shape on its way: `x`, `y` is where its middle starts, `size` about its radius, `way` how far it goes, all in pixels."""

    shape: str
    colour: str
    floor: str
    direction: str
    size: float
    x: float
    y: float
    way: float

    def caption(self, form: int = 0, name: str | None = None) -> str:
        """What is seen, in one of CAPTIONS' forms; `name` is for the shape."""
        words = {"colour": self.colour, "floor": self.floor, "direction": self.direction}
        text = CAPTIONS[form % len(CAPTIONS)].format(shape=name or self.shape, **words)
        return text.replace("a orange", "an orange")


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None is for what cannot be told."""

    shape: str | None
    colour: str | None
    direction: str | None


def random_scene(
    rng: np.random.Generator,
    shapes: Sequence[str] = SHAPES,
    spread: float = 1.0,
    colours: Sequence[str] = tuple(COLOURS),
    floors: Sequence[str] = tuple(FLOORS),
    directions: Sequence[str] = tuple(DIRECTIONS),
) -> Scene:
    """A scene of 64 x 96 pixels in which the shape stays within the picture; `spread` scales how far its places differ."""
    shape, colour, floor, direction = (str(rng.choice(list(of))) for of in (shapes, colours, floors, directions))
    size = rng.uniform(11, 15)
    along, across = rng.uniform(-spread, spread, 2)
    if direction in ("right", "left"):
        way = rng.uniform(36, 48)
        x, y = WIDTH / 2 - DIRECTIONS[direction][0] * way / 2 + 6 * along, HEIGHT / 2 + (HEIGHT / 2 - size - 4) * across
    else:
        way = rng.uniform(22, 30)
        x, y = WIDTH / 2 + (WIDTH / 2 - size - 6) * across, HEIGHT / 2 - DIRECTIONS[direction][1] * way / 2 + 2 * along
    return Scene(shape, colour, floor, direction, size, x, y, way)


def draw(scene: Scene, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Antialiased uint8 frames (F, H, W, 3) of the scene."""
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    step = np.array(DIRECTIONS[scene.direction]) * scene.way / max(frames - 1, 1)
    floor, colour = np.array(FLOORS[scene.floor]), np.array(COLOURS[scene.colour])
    video = np.empty((frames, height, width, 3), np.uint8)
    for number in range(frames):
        x, y = np.array((scene.x, scene.y)) + number * step
        cover = np.clip(0.5 - distance(scene.shape, columns - x, rows - y, scene.size), 0, 1)[..., None]
        video[number] = np.round(floor * (1 - cover) + colour * cover)
    return video


def distance(shape: str, x: np.ndarray, y: np.ndarray, size: float) -> np.ndarray:
    """Distance in pixels, about, of the points (x, y) from the shape's edge, where 0, 0 is its middle; negative inside."""
    match shape:
        case "ball":
            return np.hypot(x, y) - size
        case "ring":
            return np.abs(np.hypot(x, y) - 0.75 * size) - 0.27 * size
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.88 * size
        case "triangle":
            sides = abs(x) * math.sqrt(3) / 2 - y / 2 - 0.1 * size
            return np.maximum(sides, y - 0.15 * size) - 0.5 * size
        case "cross":
            wide = np.maximum(abs(x) - size, abs(y) - 0.32 * size)
            return np.minimum(wide, np.maximum(abs(y) - size, abs(x) - 0.32 * size))
    raise ValueError(f"no shape is called {shape!r}")


def seen(video: np.ndarray) -> Seen:
    """Which shape, colour and direction a clip, uint8 (F, H, W, 3), shows: what stands out from the floor is looked at in five
    frames, of which most decide.
    """
    frames = video[np.linspace(0, len(video) - 1, 5).round().astype(int)]
    masks = [_stands_out(frame) for frame in frames]
    found = [(frame, mask) for frame, mask in zip(frames, masks, strict=True) if 40 <= mask.sum() < 0.4 * mask.size]
    if len(found) < 3:
        return Seen(None, None, None)
    shape, count = Counter(_shape(mask) for _, mask in found).most_common(1)[0]
    colour = Counter(_colour(frame, mask) for frame, mask in found).most_common(1)[0][0]
    way = _middle(found[-1][1]) - _middle(found[0][1])  # rows, columns
    axis = int(abs(way[1]) > abs(way[0]))
    name = (("up", "down"), ("left", "right"))[axis][int(way[axis] > 0)]
    return Seen(shape if count > len(found) / 2 else None, colour, name if abs(way[axis]) > 6 else None)


def _stands_out(frame: np.ndarray) -> np.ndarray:
    """Which pixels (H, W) differ from the floor, the median of the picture's edge, by more than half of what the shape does."""
    picture = frame.astype(int)
    edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    apart = np.abs(picture - np.median(edge, axis=0)).max(-1)
    return apart > max(40, np.quantile(apart, 0.98) / 2)


def _middle(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(0)


def _colour(frame: np.ndarray, mask: np.ndarray) -> str:
    of_shape = np.median(frame[mask], axis=0)
    return min(COLOURS, key=lambda name: float(np.abs(np.array(COLOURS[name]) - of_shape).sum()))


def _shape(mask: np.ndarray) -> str | None:
    """A ring is what has nothing in its middle and something all around, or what encloses a hole; other shapes are compared with
    their drawings.
    """
    row, column = _middle(mask)
    rows, columns = np.mgrid[0 : mask.shape[0], 0 : mask.shape[1]]
    rows, columns = rows - row, columns - column
    far = np.hypot(rows, columns)
    reach = np.quantile(far[mask], 0.9)
    inside = mask & (far < 0.35 * reach)
    sectors = np.floor((np.arctan2(rows, columns)[mask & ~inside] / np.pi + 1) * _SECTORS / 2) % _SECTORS
    is_empty = inside.sum() < 0.3 * (far < 0.35 * reach).sum()
    hole = _enclosed(mask) & (far < reach)
    if (is_empty and len(set(sectors)) >= 0.75 * _SECTORS) or hole.sum() > _LEAST_HOLE * mask.sum():
        return NEW_SHAPE
    best, name = _LEAST_OVERLAP, None
    for shape in SHAPES:
        for size in np.arange(8, 18.5, 0.5):
            drawn = (
                distance(shape, columns, rows + (_TRIANGLES_CENTROID * size if shape == "triangle" else 0), size) < 0
            )
            overlap = (drawn & mask).sum() / (drawn | mask).sum()
            if overlap > best:
                best, name = overlap, shape
    return name


def _enclosed(mask: np.ndarray) -> np.ndarray:
    """The pixels that are not of the mask and that no way outside of it leads to from the picture's edge."""
    free = np.pad(~mask, 1, constant_values=True)
    outside = np.zeros_like(free)
    outside[0] = outside[-1] = outside[:, 0] = outside[:, -1] = True
    while True:
        grown = outside.copy()
        grown[1:] |= outside[:-1]
        grown[:-1] |= outside[1:]
        grown[:, 1:] |= outside[:, :-1]
        grown[:, :-1] |= outside[:, 1:]
        grown &= free
        if (grown == outside).all():
            return (free & ~outside)[1:-1, 1:-1]
        outside = grown
