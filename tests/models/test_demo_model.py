"""The training of the demo's pipeline: its short text is the pipeline's 512 tokens, and a kill changes nothing."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from processes import ROOT

from benchmarks import demo_model
from finetune.commands.demo import LEARNT

RECIPE = tomllib.loads(demo_model.RECIPE.read_text())


def test_the_recipe_lies_beside_the_weights() -> None:
    assert demo_model.RECIPE == LEARNT / "recipe.toml"


def test_attention_to_short_text_is_that_to_512_tokens() -> None:
    transformer = demo_model.new_transformer(RECIPE["transformer"], RECIPE["text"], 0)
    torch.nn.init.normal_(transformer.proj_out.weight)
    short = demo_model.embedded(*demo_model.text_parts(RECIPE["text"], 0), ["a red ball moves up", ""])
    long = torch.zeros(2, 512, short.shape[-1])
    long[:, : short.shape[1]] = short
    x, timestep = torch.randn(2, 8, 2, 4, 6), torch.tensor([300.0, 800.0])
    with torch.no_grad():
        expected = transformer(x, timestep, long, return_dict=False)[0]
        for block in transformer.blocks:
            block.attn2.set_processor(demo_model.ShortText())
        got = transformer(x, timestep, short, return_dict=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_words_have_embeddings_of_their_own() -> None:
    names = ["ball", "square", "zorb", "red", "blue", "left"]
    captions = [f"a {name} moves over a black floor" for name in names]
    table = demo_model.embedded(*demo_model.text_parts(RECIPE["text"], 0), captions)[:, 1]
    alike = torch.cosine_similarity(table[:, None], table[None], dim=-1) - torch.eye(len(names))
    assert alike.abs().max() < 0.5


def train(work: Path, steps: int, *more: object) -> list[str]:
    """The command of a short training of all parts."""
    program = ["-m", "benchmarks.demo_model", "--work", work, "--steps", steps, *more]
    return [sys.executable, *map(str, program)]


@pytest.mark.full
def test_twenty_steps_of_each_part_make_a_pipeline(tmp_path: Path) -> None:
    subprocess.run(train(tmp_path / "work", 20, "--write", tmp_path / "pipeline"), cwd=ROOT, check=True, timeout=280)
    pipeline = WanPipeline.from_pretrained(tmp_path / "pipeline")
    frames = pipeline("a red ball", num_frames=17, height=64, width=96, num_inference_steps=1, output_type="np").frames
    assert frames.shape == (1, 17, 64, 96, 3)
    rows = [json.loads(line) for line in (tmp_path / "pipeline" / "curve.jsonl").read_text().splitlines()]
    assert {row["part"]: row["step"] for row in rows} == {"vae": 60, "transformer": 20}


@pytest.mark.full
def test_a_training_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    subprocess.run(train(tmp_path / "whole", 4), cwd=ROOT, check=True, timeout=280)
    process = subprocess.Popen(train(tmp_path / "killed", 4, "--every", 1), cwd=ROOT)
    curve, end = tmp_path / "killed" / "curve.jsonl", time.monotonic() + 280
    while not curve.exists() or '"transformer", "step": 2' not in curve.read_text():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    subprocess.run(train(tmp_path / "killed", 4), cwd=ROOT, check=True, timeout=280)
    for part in ("vae.pt", "transformer.pt"):
        expected, got = (torch.load(tmp_path / work / part) for work in ("whole", "killed"))
        for kind in ("model", "average"):
            assert expected[kind].keys() == got[kind].keys()
            assert all(torch.equal(tensor, got[kind][name]) for name, tensor in expected[kind].items())
