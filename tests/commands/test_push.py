"""The command that gives a finished run to the Hub, against a stand-in that the real client of the Hub talks to."""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import pytest
import torch
from every_family import FIRST
from hub_stand_in import Hub, Repository
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from processes import Finetune
from safetensors.torch import load_file

from finetune.commands import push
from finetune.recipe import load_recipe
from finetune.runtime.distributed import Runtime
from finetune.runtime.errors import UserError
from finetune.training.run import train

PROMPT = "a ball | rolls *down* <b>the hill</b>\n`fast`"
SETTINGS = [
    "train.steps=2",
    "data.id_token=sks",
    "validation.heldout_clips=2",
    "validation.sigmas=1",
    "lora.alpha=8",
    "lora.rslora=true",
    "objective.loss=huber",
    "ema.decay=0.9",
    f"validation.prompts=[{{text = {json.dumps(PROMPT)}, shape = '17x64x96', steps = 2, count = 2}}]",
]
REPO, BASE = "me/surf", "Lightricks/LTX-Video"
Push = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[[Path], Path], runtime: Runtime) -> Path:
    """The folder of a finished run. Copy it before changing it."""
    recipe = load_recipe(small_recipe(tmp_path_factory.mktemp("pushed")), SETTINGS)
    assert train(recipe, runtime) == 0
    return recipe.output


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, as this process's Hub, with a token of the user "me"; the base model is on it."""
    with Hub() as started:
        monkeypatch.setattr(constants, "ENDPOINT", started.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        licence = {"license": "other", "license_name": "ltx-licence", "license_link": "LICENSE.md"}
        started.repositories[BASE] = Repository(False, card=licence)
        yield started


@pytest.fixture
def pushed(trained: Path, capsys: pytest.CaptureFixture[str]) -> Push:
    """Push the run, or another, with further arguments; returns what is said."""

    def command(*arguments: str, run: Path = trained, repo: str = REPO) -> str:
        capsys.readouterr()
        parser = argparse.ArgumentParser()
        push.add_arguments(parser)
        assert push.run(parser.parse_args(["--run", str(run), "--repo", repo, *arguments])) == 0
        return capsys.readouterr().err

    return command


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_file_arrives_byte_for_byte(hub: Hub, pushed: Push, trained: Path, tmp_path: Path) -> None:
    said = pushed("--base-model", BASE, "--message", "the first")
    pushed("--base-model", BASE, "--offline-folder", str(tmp_path / "out"))
    files = hub.files(REPO)
    assert files == contents(tmp_path / "out") | {"README.md": files["README.md"]}
    assert files.keys() == {
        "README.md",
        "recipe.toml",
        "pytorch_lora_weights.safetensors",
        *(f"samples/{name}" for name in ("00_seed0.mp4", "00_seed1.mp4", "contact_sheet.png")),
    }
    lora = "pytorch_lora_weights.safetensors"
    assert files[lora] == (trained / "lora" / lora).read_bytes()
    for name, content in contents(trained / "samples" / "step_00000002").items():
        assert files[f"samples/{name}"] == content
    assert hub.messages == ["the first"]
    assert f"{hub.address}/{REPO}/commit/" in said
    assert "(private)" in said


def test_a_repository_is_private_unless_it_is_asked_to_be_public(hub: Hub, pushed: Push) -> None:
    pushed(repo="hidden")  # of the token's user
    assert "(public)" in pushed("--public", repo="me/shown")
    assert hub.repositories["me/hidden"].private
    assert not hub.repositories["me/shown"].private
    before = dict(hub.files("me/shown"))
    with pytest.raises(UserError, match="this repository is public") as error:
        pushed("--revision", "other", repo="me/shown")
    assert "--public" in str(error.value)
    assert hub.files("me/shown") == before
    assert hub.repositories["me/shown"].branches.keys() == {"main"}


def test_what_is_there_already_is_not_sent_again(hub: Hub, pushed: Push, trained: Path, tmp_path: Path) -> None:
    pushed()
    hub.requests.clear()
    assert "nothing has changed" in pushed()
    assert not hub.sent("PUT ")
    assert not hub.sent("/commit/")
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    video = changed / "samples" / "step_00000002" / "00_seed1.mp4"
    shutil.copyfile(video.with_name("00_seed0.mp4"), video)
    pushed(run=changed)
    assert not hub.sent("PUT ")  # of content that the repository has under another name
    assert hub.files(REPO)["samples/00_seed1.mp4"] == hub.files(REPO)["samples/00_seed0.mp4"]
    assert hub.repositories[REPO].branches["main"].commits == 3


def test_a_branch_is_made_and_named_in_the_card(hub: Hub, pushed: Push) -> None:
    pushed("--revision", "v2")
    assert hub.files(REPO) == {}
    text = hub.files(REPO, "v2")["README.md"].decode()
    assert 'load_lora_weights("me/surf", revision="v2", weight_name=' in text


def test_the_card_tells_what_the_run_was(hub: Hub, pushed: Push) -> None:
    pushed("--base-model", BASE)
    files = hub.files(REPO)
    card = ModelCard(files["README.md"].decode())
    card_head = card.data.to_dict()
    assert card_head["base_model"] == BASE
    assert card_head["base_model_relation"] == "adapter"
    assert (card_head["library_name"], card_head["pipeline_tag"]) == ("diffusers", "text-to-video")
    assert card_head["instance_prompt"] == "sks"
    assert (card_head["license"], card_head["license_name"]) == ("other", "ltx-licence")
    assert card_head["license_link"] == f"https://huggingface.co/{BASE}/blob/main/LICENSE.md"
    assert [each["text"] for each in card_head["widget"]] == [PROMPT, PROMPT]
    assert all(each["output"]["url"] in files for each in card_head["widget"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line[:1] == "|"]
    facts = {row[0]: row[1] for row in rows if len(row) == 2}
    assert facts["steps"] == "2"
    assert facts["clips"] == "10"  # of twelve, without those held out
    assert (facts["rank"], facts["alpha"]) == ("4", "8")
    assert facts["kind"] == "alpha / sqrt(rank)"
    assert facts["weights"] == "their moving average, decay 0.9"
    assert facts["loss"] == "huber, delta 1"
    assert facts["shapes (frames x height x width)"] == "17x64x96"
    steps = [row[0] for row in rows if len(row) == 3]
    assert steps[:4] == ["step", "---:", "0", "2"]


def test_the_card_names_the_adapters_that_were_given_without_their_places(
    pushed: Push, trained: Path, recipe_file: Path, runtime: Runtime, tmp_path: Path
) -> None:
    first, below = tmp_path / "first.safetensors", tmp_path / "below.safetensors"
    for file in (first, below):
        shutil.copyfile(trained / "lora" / "pytorch_lora_weights.safetensors", file)
    given = [f"lora.start_from={first}", f'lora.frozen=[{{path = "{below}", strength = 0.5}}]']
    prompts = 'validation.prompts=[{text = "a ball", shape = "9x64x64", steps = 2, strength = [0, 0.5]}]'
    recipe = load_recipe(recipe_file, [*given, prompts, "train.steps=1", "validation.heldout_clips=2"])
    assert train(recipe, runtime) == 0
    said = pushed("--offline-folder", str(tmp_path / "out"), run=recipe.output)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- below.safetensors at strength 0.5\n" in text
    assert "step 0 is the base model with the adapters that it was trained on top of with the adapter that" in text
    assert "first.safetensors" in text
    assert [each["output"]["url"] for each in ModelCard(text).data.widget] == ["samples/00_seed0_strength0.5.mp4"]
    assert "| a ball | 0 | 0 | [00\\_seed0\\_strength0.mp4](samples/00_seed0_strength0.mp4) |" in text
    assert "lora.start_from, lora.frozen.path" in said
    for name, content in contents(tmp_path / "out").items():
        assert str(tmp_path).encode() not in content, name


def test_the_card_renders_and_its_links_lead_to_files(hub: Hub, pushed: Push) -> None:
    pushed()
    files = hub.files(REPO)
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(files["README.md"].decode()).text)
    parts = [part for token in tokens for part in (token, *(token.children or []))]
    assert not [part for part in parts if part.type.startswith("html")]  # whatever prompts have in them
    targets = [
        str(part.attrs.get("href", part.attrs.get("src", ""))) for part in parts if {"href", "src"} & part.attrs.keys()
    ]
    local = {target for target in targets if "://" not in target}
    assert local == files.keys() - {"README.md"}
    shown = [token.content for token in tokens if token.type == "inline"]
    rendered = "".join(part.content for part in parts if part.type in ("text", "text_special"))
    assert " ".join(PROMPT.split()) in rendered
    assert shown.index("surf") == 0
    cells = [token.map for token in tokens if token.type == "tr_open"]
    assert len(cells) == 13 + 3 + 3  # each table's head, and its rows


def test_the_lines_of_the_card_load_the_weights(pushed: Push, trained: Path, tiny_ltx: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pushed("--offline-folder", str(out))
    (code,) = [t.content for t in MarkdownIt().parse(ModelCard.load(out / "README.md").text) if t.type == "fence"]
    code = code.replace(f'"{REPO}"', f'"{out}"').replace('"path/to/the/base/model"', f'"{tiny_ltx}"')
    compile(code, "card", "exec")
    names: dict = {}
    exec(code.partition("video = ")[0], names)
    pipe = names["pipe"]
    assert isinstance(pipe, diffusers.LTXPipeline)
    adapted = {name: value for name, value in pipe.transformer.state_dict().items() if ".lora_" in name}
    expected = load_file(trained / "lora" / "pytorch_lora_weights.safetensors")
    assert len(adapted) == len(expected) > 0
    for name, value in adapted.items():
        assert torch.equal(value, expected["transformer." + name.replace(".default_0.", ".")])


def test_the_recipe_is_whole_and_nothing_tells_where_things_lie(pushed: Push, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = pushed("--base-model", BASE, "--offline-folder", str(out))
    shared, own = load_recipe(out / "recipe.toml"), load_recipe(trained / "recipe.toml")
    assert shared.model.path == BASE
    assert shared.data.path == Path("path/to/clips")
    assert shared.model_copy(update={"data": own.data, "model": own.model, "output": own.output}) == own
    places = [own.data.path, own.data.cache, own.output, own.model.path, str(Path.home())]
    for name, content in contents(out).items():
        assert not [place for place in places if str(place).encode() in content], name
    assert "left out of the recipe: output, data.path, data.cache, tracking, model.path" in said


def test_without_a_network_the_folder_and_the_command_for_later_are_left(
    finetune: Finetune, pushed: Push, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    done = finetune("push", "--run", run, "--repo", REPO, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    (command,) = [line.strip() for line in done.stderr.splitlines() if line.strip().startswith("hf upload")]
    assert command.startswith(f"hf upload {REPO} {run / 'hub'} . --private")
    with Hub() as hub:
        online = {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_me", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        path = f"{Path(os.sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(command, shell=True, check=True, env={**os.environ, **online, "PATH": path}, capture_output=True)
        assert hub.files(REPO) == contents(run / "hub")
        assert hub.repositories[REPO].private
    with pytest.raises(UserError, match="not an empty folder"):  # its files are the user's now
        pushed("--offline-folder", str(run / "hub"))
    with pytest.raises(UserError, match="offline it is not known whose it is"):
        pushed("--offline-folder", str(tmp_path / "out"), repo="surf")


@pytest.mark.parametrize(
    ("path", "fault", "what", "cure"),
    [
        ("/api/repos/create", 401, "does not accept the token", "hf auth login"),
        ("/commit/", 403, "may not write to the repository", "--repo YOU/NAME"),
        ("/commit/", 404, "no such repository or branch", "--revision"),
        ("/api/repos/create", 500, "the Hub has failed", "try again later"),
        ("/commit/", 412, "somebody else has pushed", "the same command goes on"),
        ("/commit/", "drop", "cannot be reached", "the same command goes on"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line_with_its_cure(
    hub: Hub, pushed: Push, path: str, fault: int | str, what: str, cure: str
) -> None:
    hub.faults.append((path, fault))
    with pytest.raises(UserError, match=what) as error:
        pushed()
    (problem,) = error.value.problems
    assert cure in problem.cure
    assert "\n" not in problem.what
    hub.requests.clear()
    pushed()  # the fault is over
    assert len(hub.files(REPO)) == 6
    assert path != "/commit/" or not hub.sent("PUT ")  # the large files had arrived


def test_a_connection_that_drops_while_a_file_is_sent_is_made_again(hub: Hub, pushed: Push, trained: Path) -> None:
    hub.faults.append(("/lfs/me/", "drop"))
    pushed()
    lora = "pytorch_lora_weights.safetensors"
    assert hub.files(REPO)[lora] == (trained / "lora" / lora).read_bytes()
    assert len(hub.sent("PUT ")) == 5  # of four files


def test_a_repository_of_somebody_else_is_refused(hub: Hub, pushed: Push) -> None:
    with pytest.raises(UserError, match="may not write to the repository"):
        pushed(repo="you/surf")
    hub.repositories["you/surf"] = Repository(private=True)
    with pytest.raises(UserError, match="may not write to the repository"):
        pushed(repo="you/surf")
    assert hub.files("you/surf") == {}


def test_no_token_and_no_network_name_their_cures(hub: Hub, pushed: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"(?s)no token.*hf auth login.*--offline-folder"):
        pushed()
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    with pytest.raises(UserError, match=r"(?s)does not accept the token \(401.*hf auth login"):
        pushed()
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(UserError, match=r"(?s)cannot be reached.*--offline-folder"):
        pushed()


def test_runs_that_are_not_finished_or_not_as_they_were_verified_are_refused(
    hub: Hub, pushed: Push, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"there is no recipe\.toml of a run"):
        pushed(run=tmp_path)
    with pytest.raises(UserError, match=r"(?s)not finished: its results are of step 2, and the recipe has 9 steps"):
        pushed("--set", "train.steps=9")
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    with (changed / "lora" / "pytorch_lora_weights.safetensors").open("ab") as file:
        file.write(b"0")
    with pytest.raises(UserError, match=r"(?s)not as it was when the weights were verified.*start the training again"):
        pushed(run=changed)
    (changed / "results.json").unlink()
    with pytest.raises(UserError, match=r"(?s)not finished: it has no results.*train it to its end"):
        pushed(run=changed)
    assert hub.repositories.keys() == {BASE}


@pytest.mark.parametrize("repo", ["a/b/c", "sur f", "", "https://host/me/surf", "me/..", "me/-x", "me/a--b", "é/x"])
def test_what_is_no_name_of_a_repository_is_refused_before_anything_is_read(pushed: Push, repo: str) -> None:
    with pytest.raises(UserError, match="not the name of a repository"):
        pushed(repo=repo)


MODELS_PUSHED = [
    ("ltx", None, "full"),
    ("wan", "2.2-A14B", "lora"),
    ("wan", "2.2-A14B", "full"),
    ("wan", "2.2-A14B", "partial"),
    *((family, variant, "lora") for family, variant in FIRST if family not in ("ltx", "wan")),
]


@pytest.mark.full
@pytest.mark.parametrize(("name", "variant", "method"), MODELS_PUSHED)
def test_every_model_is_loaded_by_the_lines_of_its_card(
    pushed: Push,
    family_recipe: Callable[..., Path],
    tiny_model: Callable[..., Path],
    runtime: Runtime,
    tmp_path: Path,
    name: str,
    variant: str | None,
    method: str,
) -> None:
    settings = [f"output={tmp_path / 'run'}", "train.steps=2", f"train.method={method}"]
    settings += ["partial.modules=norm_q"] if method == "partial" else []
    recipe = load_recipe(family_recipe(name, variant), settings)
    assert train(recipe, runtime) == 0
    out = tmp_path / "out"
    pushed("--offline-folder", str(out), run=recipe.output)
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == ("image-to-video" if "i2v" in name else "text-to-video")
    assert ("lora" in card.data.tags) == (method == "lora")
    (code,) = [token.content for token in MarkdownIt().parse(card.text) if token.type == "fence"]
    base = tiny_model(name, variant)
    code = code.replace(f'"{REPO}"', f'"{out}"').replace('"path/to/the/base/model"', f'"{base}"')
    compile(code, "card", "exec")
    names: dict = {}
    exec(code.partition("video = ")[0], names)
    files = list(out.rglob("*.safetensors"))
    assert len(files) == (2 if variant == "2.2-A14B" else 1)
    for file in files:
        is_second = "transformer_2" in file.parts or "low_noise" in file.name
        loaded = getattr(names["pipe"], "transformer_2" if is_second else "transformer").state_dict()
        plain = {
            re.sub(r"\.(default_0|high_noise|low_noise)\.weight$", ".weight", key): value
            for key, value in loaded.items()
        }
        expected = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        assert expected.keys() <= plain.keys()
        assert all(torch.equal(plain[key], value) for key, value in expected.items())
        for text in (file.parent / "config.json", out / "README.md", out / "recipe.toml"):
            assert not text.exists() or str(base.parent) not in text.read_text()
