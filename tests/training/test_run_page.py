"""The page of a run is whole in itself, shows what the folder has, whatever has happened to the run, and lets nothing in it act."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from processes import Finetune

from finetune.data.synthetic import scene
from finetune.recipe import Recipe, write_recipe
from finetune.runtime.errors import UserError
from finetune.runtime.files import FolderLock
from finetune.tracking.media import write_video
from finetune.training.run_page.page import write_run_page
from finetune.training.run_page.previews import sample_grid

EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> "a" & \u202eb 一只球'
NOTE = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": f"torchrun -m finetune --recipe '{EVIL}'",
    "versions": {"torch": "2.13.0", "finetune": "1.2"},
    "system": "Linux",
    "devices": [{"host": "a-host", "name": "NVIDIA H100", "memory_gib": 79.1}] * 2,
    "model": {"base_model": "owner/model", "base_license": "mit"},
    "title": "LTX-Video",
    "trained_parameters": 1234567,
    "batch": {"global": 8, "ranks": 2, "micro": 2, "accumulation": 2},
    "steps_per_epoch": 12,
    "clips": {"trained": 96, "heldout": 4},
    "datasets": [
        {
            "path": EVIL,
            "heldout": False,
            "clips": 96,
            "images": 3,
            "samples": 96,
            "seconds": 410.0,
            "buckets": {"17x64x96": 96},
            "trimmed": 31,
            "unused_frames": 62,
            "cropped": 5,
            "enlarged": 0,
            "refused": [{"where": "bad.mp4", "what": EVIL}],
            "refused_count": 7,
            "unused": [],
            "unused_count": 0,
        }
    ],
}
ROWS: list[dict[str, Any]] = [
    {
        "step": step,
        "loss": 2 - step / 50,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "seconds_per_step": 2.0,
        "peak_memory_reserved_gib": 12.5,
    }
    for step in range(1, 61)
]
HELD_OUT = [
    {"step": step, "heldout_loss": 2.1 - step / 60, "heldout_zero_loss": 2.0, "heldout_loss_sigma/q1": 1.5}
    for step in (0, 20, 40, 60)
]


class Page(HTMLParser):
    """What a browser would find in a page: its elements, and all of its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self.text += " "
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "script"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def charts(self) -> dict[str, dict]:
        """The values of each chart by its title."""
        titles = [svg["aria-label"] for svg in self.of("svg")]
        values = [json.loads(each["data-chart"] or "") for each in self.of("div") if "data-chart" in each]
        return dict(zip(map(str, titles), values, strict=True))


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes a run's folder as a training leaves it."""

    def make(
        rows: list[dict[str, Any]],
        steps: int = 60,
        prompts: tuple[str, ...] = (),
        starts: tuple[tuple[int, float], ...] = ((0, 1e-3),),
        folder: Path = tmp_path / "a run",
        model: dict[str, Any] | None = None,
    ) -> Path:
        (folder / "starts").mkdir(parents=True)
        for number, (step, rate) in enumerate(starts):
            values = {
                "output": str(folder.parent if model and "experts" in model else folder),
                "model": {"family": "ltx", "path": "owner/model", **(model or {})},
                "data": {"path": "clips", "buckets": ["17x64x96"], "id_token": "ohwx"},
                "train": {"steps": steps},
                "optimizer": {"lr": rate},
                "validation": {"prompts": [{"text": text} for text in prompts]},
            }
            recipe = Recipe.model_validate(values)
            name = f"after_step_{step:08d}"
            for path in (folder / "starts" / f"{name}.toml", folder / "recipe.toml"):
                write_recipe(recipe, path)
            note = {**NOTE, "time": f"2026-01-0{number + 1}T00:00:00+00:00"}
            (folder / "starts" / f"{name}.json").write_text(json.dumps(note))
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return folder

    return make


def add_samples(run: Path, step: int, names: tuple[str, ...], video: np.ndarray) -> None:
    for name in names:
        write_video(video, run / "samples" / f"step_{step:08d}" / f"{name}.mp4", 25)


def test_a_finished_run_shows_all_that_is_known_of_it(make_run: MakeRun) -> None:
    run = make_run([*ROWS, *HELD_OUT], prompts=("a red ball",))
    (run / "results.json").write_text('{"step": 60}')
    (run / "use.py").write_text("pipe = DiffusionPipeline.from_pretrained('<model>')")
    figures = {"measured": {"allocated": 2**34, "reserved": 2**35}, "planned": {"allocated": 2**34, "reserved": 2**34}}
    (run / "memory.json").write_text(json.dumps({**figures, "relative_error": {"allocated": 0.0, "reserved": -0.5}}))
    add_samples(run, 0, ("00_seed0",), scene(0, 9, 64, 96)[0])
    path, size = write_run_page(run)
    page = Page(path)
    assert path == run / "report.html"
    assert size == path.stat().st_size
    for told in (
        "a run finished",
        "60 / 60 steps",
        "2.1 → 1.1",
        "owner/model",
        "trigger word ohwx",
        "Begin prompts with ohwx, as the captions",
        "96 trained on, 4 held out",
        "clips used 96 3 of them images trimmed 31 62 frames unused cropped 5",
        "refused 7",
        "Reserved 16.00 GiB 32.00 GiB -50.0 %",
        "8 = 2 ranks × 2 samples × 2 accumulation; 12 steps an epoch",
        "torch 2.13.0",
        "2 × NVIDIA H100 (79.1 GiB) on a-host",
        "from_pretrained('<model>')",
        "optimizer.lr 0.001 0.0001",
    ):
        assert told in page.words
    assert set(page.charts) == {
        "Training loss",
        "Held-out loss",
        "Held-out loss by noise level",
        "Learning rate",
        "Gradient norm",
        "Seconds per step",
    }
    heldout = page.charts["Held-out loss"]["curves"][0]["points"]
    assert heldout == [[0, 2.1], [20, 1.76667], [40, 1.43333], [60, 1.1]]
    raw = page.charts["Training loss"]["curves"][0]["points"]
    assert raw == [[row["step"], pytest.approx(row["loss"])] for row in ROWS]


def test_nothing_of_a_run_acts_in_the_page_and_nothing_is_fetched(make_run: MakeRun) -> None:
    run = make_run([*ROWS, *HELD_OUT], prompts=(EVIL,))
    add_samples(run, 0, ("00_seed0",), scene(0, 9, 64, 96)[0])
    page = Page(write_run_page(run)[0])
    assert len(page.of("script")) == 1
    assert "alert" not in page.source.split("<script>")[1]
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in page.elements)
    assert all("onerror" not in attributes for _, attributes in page.elements)
    links = {each["href"] for each in page.of("a")}
    assert all(link.startswith(("#", "samples/", "recipe.toml")) for link in links if link)
    (policy,) = [each["content"] or "" for each in page.of("meta") if "http-equiv" in each]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:;")
    assert EVIL.replace("\u202e", "\\u202e") in page.text
    assert "url(" not in page.source
    assert "http://" not in page.source
    assert "https://" not in page.source


def test_previews_are_videos_that_play_and_full_ones_are_linked(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(ROWS, prompts=("a red ball", "a blue ball"))
    for step in (0, 20):
        add_samples(run, step, ("00_seed0", "01_seed0_strength0.5"), scene(0, 25, 128, 384)[0])
    (run / "samples" / "step_00000020" / "00_seed0.mp4").write_bytes(b"cut off")
    write_video(scene(1, 1, 64, 96)[0], run / "samples" / "step_00000020" / "02_seed3.png", 25)
    page = Page(write_run_page(run)[0])
    assert "a red ball seed 0" in page.words
    assert "a blue ball seed 0, strength 0.5" in page.words
    assert page.words.count("cannot be read") == 1
    videos = page.of("video")
    assert len(videos) == 3
    assert {(video["width"], video["height"]) for video in videos} == {("320", "106")}
    played = tmp_path / "played.mp4"
    played.write_bytes(base64.b64decode((videos[0]["src"] or "").removeprefix("data:video/mp4;base64,")))
    shown = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", played, "-f", "null", "-"]
    report = subprocess.run(shown, capture_output=True, text=True, check=True).stderr
    assert "320x106" in report
    assert re.findall(r"frame=\s*(\d+)", report)[-1] == "25"
    assert [image["src"][:16] for image in page.of("img") if image["src"]] == ["data:image/webp;"]
    for link in page.of("a"):
        if (target := link["href"] or "").startswith("samples/"):
            assert (run / target).is_file()


def test_where_all_would_be_too_large_the_first_and_the_last_step_stay(make_run: MakeRun) -> None:
    run = make_run(ROWS, prompts=("a red ball",))
    noise = np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), dtype=np.uint8)
    for step in (0, 10, 20, 30, 40):
        add_samples(run, step, ("00_seed0",), noise)
    recipe = Recipe.model_validate(
        {"model": {"family": "ltx", "path": "x"}, "data": {"path": "clips", "buckets": ["17x64x96"]}}
    )
    whole = sample_grid(run, recipe, run, budget=10**9, seconds=100)
    assert whole is not None
    assert whole.steps == [0, 10, 20, 30, 40]
    one = max(preview.size for preview in whole.rows[0].previews.values())
    some = sample_grid(run, recipe, run, budget=3 * one + one // 2, seconds=100)
    assert some is not None
    assert (some.steps, some.linked) == ([0, 20, 40], [10, 30])
    assert "would be larger" in some.why
    hurried = sample_grid(run, recipe, run, budget=10**9, seconds=0)
    assert hurried is not None
    assert (hurried.steps, hurried.linked) == ([40], [0, 10, 20, 30])
    assert sample_grid(run / "starts", recipe, run, 10**9, 100) is None


def test_a_run_that_is_under_way_says_so_and_one_that_was_cut_off_too(make_run: MakeRun) -> None:
    run = make_run(ROWS[:20])
    with FolderLock(run):
        assert "under way: step 20 of 60" in Page(write_run_page(run)[0]).words
    assert "stopped after step 20 of 60; the same command goes on" in Page(write_run_page(run)[0]).words


def test_a_run_that_has_just_begun_has_a_page(make_run: MakeRun) -> None:
    run = make_run([])
    assert "There are no figures yet" in Page(write_run_page(run)[0]).words
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "starts")  # as an older version's, which noted nothing
    assert "There are no figures yet" in Page(write_run_page(run)[0]).words


def test_figures_that_are_not_finite_are_told_and_leave_the_charts_alone(make_run: MakeRun) -> None:
    spoilt = [*ROWS[:30], {"step": 31, "loss": float("nan"), "grad_norm": float("inf")}]
    page = Page(write_run_page(make_run(spoilt))[0])
    assert "The training loss is not finite at step 31" in page.words
    assert len(page.charts["Training loss"]["curves"][0]["points"]) == 30
    assert "NaN" not in page.source
    assert "Infinity" not in page.source


def test_restarts_are_marked_with_what_they_changed(make_run: MakeRun) -> None:
    run = make_run(ROWS, starts=((0, 1e-3), (20, 1e-3), (40, 5e-4)))
    page = Page(write_run_page(run)[0])
    assert "after step 20" in page.words
    assert "optimizer.lr: 0.001 → 0.0005" in page.words
    lines = [each["class"] for each in page.of("line") if str(each["class"]).startswith("mark")]
    assert lines[:2] == ["mark", "mark change"]


def test_thousands_of_steps_make_a_small_page_that_keeps_the_peaks(make_run: MakeRun) -> None:
    rows = [{"step": step, "loss": 1 + (step % 7) / 10, "grad_norm": 1.0, "lr": 1e-4} for step in range(1, 20_001)]
    rows[7776]["loss"] = 50.0
    path, size = write_run_page(make_run(rows, steps=20_000))
    assert size < 400_000
    points = Page(path).charts["Training loss"]["curves"][0]["points"]
    assert len(points) < 700
    assert [7777, 50.0] in points


def test_two_experts_share_a_page(make_run: MakeRun, tmp_path: Path) -> None:
    output = tmp_path / "both"
    for name in ("high", "low"):
        folder = make_run(ROWS, folder=output / name, model={"family": "wan", "experts": [name]}, prompts=("a ball",))
        add_samples(folder, 0, ("00_seed0",), scene(0, 5, 64, 96)[0])
    page = Page(write_run_page(output)[0])
    assert "The high-noise expert" in page.words
    assert "The low-noise expert" in page.words
    assert [svg["aria-label"] for svg in page.of("svg")].count("Training loss") == 2
    links = {link["href"] for link in page.of("a")}
    assert {f"{name}/samples/step_00000000/00_seed0.mp4" for name in ("high", "low")} <= links


@pytest.mark.parametrize(
    "spoil, told",
    [
        (lambda run: (run / "recipe.toml").write_text("steps = ="), "the run's own copy of its recipe is damaged"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl, line 1: not a row of metrics"),
        (lambda run: (run / "recipe.toml").unlink(), "there is no recipe.toml of a run in it"),
        (lambda run: (run / "report.html").mkdir(), "report.html: cannot be written"),
    ],
)
def test_what_is_damaged_is_named(make_run: MakeRun, spoil: Callable[[Path], Any], told: str) -> None:
    run = make_run(ROWS)
    spoil(run)
    with pytest.raises(UserError, match=re.escape(told)):
        write_run_page(run)


@pytest.mark.parametrize(
    "note", ["[]", "{", '{"datasets": 3, "devices": [{}], "clips": {}, "batch": 1}', '{"versions": []}']
)
def test_a_note_that_is_damaged_is_passed_over(make_run: MakeRun, note: str) -> None:
    run = make_run(ROWS)
    (run / "starts" / "after_step_00000000.json").write_text(note)
    (run / "memory.json").write_text('{"measured": 3, "planned": "x", "relative_error": []}')
    assert "60 / 60 steps" in Page(write_run_page(run)[0]).words


def test_the_command_says_where_the_page_is(finetune: Finetune, make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(ROWS)
    done = finetune("report", "--run", run)
    assert done.returncode == 0, done.stderr
    assert f"wrote {run / 'report.html'}" in done.stderr
    nowhere = finetune("report", "--run", tmp_path / "nowhere")
    assert nowhere.returncode == 2
    assert "there is no such folder" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr


@pytest.mark.full
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium to look at the page with")
def test_a_browser_runs_the_pages_own_script_and_no_other(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run([*ROWS, *HELD_OUT], prompts=(EVIL,))
    add_samples(run, 0, ("00_seed0",), scene(0, 9, 64, 96)[0])
    path, _ = write_run_page(run)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'browser'}",
    ]
    shown = [str(shutil.which("chromium")), *options, "--virtual-time-budget=3000", "--dump-dom", path.as_uri()]
    dom = subprocess.run(shown, capture_output=True, text=True, check=True, timeout=200).stdout
    assert 'title="click to play or stop"' in dom  # which the script has set
    assert re.search(r'<button type="button" class="all">play all', dom)
    assert "<script>alert" not in dom
