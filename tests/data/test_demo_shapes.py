"""The detector sees what was drawn, also after a video encoder and noise, and sees nothing where there is nothing."""

from pathlib import Path

import av
import numpy as np
import pytest

from finetune.data.shapes import COLOURS, DIRECTIONS, FLOORS, NEW_SHAPE, SHAPES, Scene, Seen, draw, random_scene, seen
from finetune.data.synthetic import Recording, record

EACH = (*SHAPES, NEW_SHAPE)


@pytest.mark.parametrize("shape", EACH)
def test_each_shape_is_recognised_on_its_way(shape: str) -> None:
    rng = np.random.default_rng(EACH.index(shape))
    for _ in range(4):
        scene = random_scene(rng, [shape])
        noisy = draw(scene) + rng.normal(0, 12, (17, 64, 96, 3))
        assert seen(noisy.clip(0, 255).astype(np.uint8)) == Seen(shape, scene.colour, scene.direction)


def test_a_shape_is_recognised_in_a_video_file(tmp_path: Path) -> None:
    scene = Scene("ring", "orange", "navy", "up", 13, 40, 46, 28)
    record(draw(scene), tmp_path / "ring.mp4", Recording("ring.mp4", 64, 96, 17, 12))
    with av.open(str(tmp_path / "ring.mp4")) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert seen(frames) == Seen("ring", "orange", "up")


def test_noise_and_an_empty_floor_show_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 96, 3), dtype=np.uint8)
    assert seen(noise).shape is None
    assert seen(np.full((17, 64, 96, 3), 90, np.uint8)) == Seen(None, None, None)


def test_a_scene_stays_in_the_picture_and_its_caption_names_all_of_it() -> None:
    rng = np.random.default_rng(0)
    for form in range(40):
        scene = random_scene(rng, EACH)
        video = draw(scene).astype(int)
        floor = np.array(FLOORS[scene.floor])
        edge = np.concatenate([video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]], axis=1)
        assert (edge == floor).all()
        words = scene.caption(form, "zorb").replace(",", "").split()
        assert {"zorb", scene.colour, scene.floor, scene.direction} <= set(words)


def test_colours_and_floors_are_apart() -> None:
    """Else neither a person nor the detector could tell a shape from its floor."""
    for colour in COLOURS.values():
        assert min(np.abs(np.array(colour) - floor).max() for floor in map(np.array, FLOORS.values())) > 60
    assert set(DIRECTIONS.values()) == {(1, 0), (-1, 0), (0, -1), (0, 1)}
