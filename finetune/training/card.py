"""A finished run as the Hugging Face Hub shows it: weights, samples, the recipe, and a model card that explains them."""

import html
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open

import finetune
from finetune.engine.weights.exporters import exporter_of
from finetune.models.family import Family
from finetune.models.folder import CARD
from finetune.recipe import RECIPE_FILE, Recipe
from finetune.recipe.schema import Lora
from finetune.recipe.shareable import is_on_hub, write_shareable
from finetune.runtime.files import writing
from finetune.training.facts import head_of_card, trigger_words
from finetune.training.finished import FinalSample, Form, Trained, samples_of
from finetune.training.output import ended_at
from finetune.training.usage import base_arguments, script

SAMPLES = "samples"
_MARK = "REPOSITORY"  # stands for it in the lines that an exporter writes
_MOST_ROWS = 12  # of held-out losses
_SPECIAL = re.compile(r"([\\`*_\[\]|#~$])")
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Destination:
    """Where a card is to be seen.

    Attributes:
        repo: the repository's id, with the owner.
        revision: its branch.
        base: the base model's id on the Hub; None if it is only known as a folder of this machine.
        licence: `license`, `license_name` and `license_link` of the base, as its card has them; empty if not known.
    """

    repo: str
    revision: str
    base: str | None
    licence: dict[str, Any]


def licence_of(head: dict[str, Any], base: str | None) -> dict[str, Any]:
    """The licence of a card's head, with a link that leads somewhere from another repository, too."""
    found = {key: head[key] for key in _LICENCE_KEYS if head.get(key)}
    link = str(found.get("license_link", ""))
    if link and "://" not in link:
        if base is None:
            del found["license_link"]
        else:
            found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link.removeprefix('./')}"
    return found


def local_licence(family: Family, trained: Sequence[Trained], base: str | None) -> dict[str, Any]:
    """The licence that the card in the base model's folder names, or the exported weights do; empty if neither does."""
    if found := licence_of(head_of_card(family.folder.path), base):
        return found
    for file in (file for each in trained for form in each.forms for file in form.files):
        if file.suffix == ".safetensors" and (named := _metadata(file).get("base_license")):
            return (
                {"license": named}
                if re.fullmatch(r"[a-z0-9.-]+", named)
                else {"license": "other", "license_name": named}
            )
    return {}


def write_folder(out: Path, recipe: Recipe, trained: Sequence[Trained], destination: Destination) -> list[str]:
    """Write weights, samples, the recipe and the card into an empty folder; returns the recipe's keys that are not as they were.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    samples, sheet = samples_of(list(trained))
    with writing(out):
        for each in trained:
            for form in each.forms:
                target = out / _place(each, form)
                target.mkdir(parents=True, exist_ok=True)
                for file in form.files:
                    shutil.copyfile(file, target / file.name)
        if sheet is not None:
            (out / SAMPLES).mkdir()
            for file in (sheet, *(sample.file for sample in samples)):
                shutil.copyfile(file, out / SAMPLES / file.name)
        left_out = write_shareable(recipe, out / RECIPE_FILE, destination.base)
        text = card(recipe, trained, samples, None if sheet is None else sheet.name, destination, left_out)
        (out / CARD).write_text(text, encoding="utf-8")
    return left_out


def card(
    recipe: Recipe,
    trained: Sequence[Trained],
    samples: Sequence[FinalSample],
    sheet: str | None,
    destination: Destination,
    left_out: Sequence[str],
) -> str:
    """The text of the model card: a head in YAML, and Markdown."""
    head = _head(recipe, trained[0].family, samples, destination)
    sections = [
        _introduction(recipe, trained[0].family, destination),
        _use(recipe, trained, destination),
        _training(trained, left_out),
        _losses(trained),
        _pictures(samples, sheet),
        _licence(destination),
    ]
    return f"---\n{head.to_yaml()}\n---\n\n" + "\n".join(section for section in sections if section)


def _head(recipe: Recipe, family: Family, samples: Sequence[FinalSample], to: Destination) -> ModelCardData:
    is_lora = recipe.train.method == "lora"
    values: dict[str, Any] = {}
    if to.base is not None:
        values |= {"base_model": to.base, "base_model_relation": "adapter" if is_lora else "finetune"}
    values |= to.licence or {"license": "other", "license_name": "that-of-the-base-model"}
    if not to.licence and to.base:
        values["license_link"] = f"https://huggingface.co/{to.base}"
    values["library_name"] = "diffusers"
    values["pipeline_tag"] = "image-to-video" if family.takes_image else "text-to-video"
    values["tags"] = [*(["lora", "template:diffusion-lora"] if is_lora else []), "video-generation", "finetune"]
    if words := trigger_words(recipe):
        values["instance_prompt"] = ", ".join(words)
    if samples:
        shown = [
            {"text": each.prompt, "output": {"url": f"{SAMPLES}/{each.file.name}"}}
            for each in samples
            if each.strength != 0  # which is made by the base model
        ]
        values["widget"] = shown
    return ModelCardData(**values)


def _introduction(recipe: Recipe, family: Family, to: Destination) -> str:
    what = {"full": "A full finetuning", "partial": "A finetuning of some weights"}.get(recipe.train.method, "A LoRA")
    base = f"[{to.base}](https://huggingface.co/{to.base})" if to.base else f"a checkpoint of {family.title}"
    does = "makes videos from a first frame and a prompt" if family.takes_image else "makes videos from a prompt"
    lines = [f"# {_plain(to.repo.rpartition('/')[2])}", "", f"{what} of {base}, which {does}."]
    if words := trigger_words(recipe):
        begin = " or ".join(f"**{_plain(word)}**" for word in words)
        lines += ["", f"Begin prompts with {begin}, as the captions in training did."]
    return "\n".join(lines) + "\n"


def _use(recipe: Recipe, trained: Sequence[Trained], to: Destination) -> str:
    first, family = trained[0].forms[0], trained[0].family
    parts = [(each.family, Path(_MARK, _place(each, each.forms[0]))) for each in trained]
    base, dtype = base_arguments(recipe, family, to.base or "path/to/the/base/model")
    loading = [_from_repository(line, to) for line in first.exporter.usage(base, dtype, parts)]
    lines = ["## How to use it", ""]
    if loading:
        lines += ["With [diffusers](https://github.com/huggingface/diffusers):", "", "```python"]
        lines += [*script(recipe, family, loading, "cuda"), "```", ""]
    for each in trained:
        for form in each.forms:
            files = ", ".join(_link(file.name, _place(each, form) / file.name) for file in form.files)
            whose = "" if each.family.expert is None else f", for the {each.family.expert}-noise expert"
            lines.append(f"- {form.exporter.title(each.family).rstrip(',')}{whose}: {files}")
    settings = recipe.adapter
    if isinstance(settings, Lora) and settings.frozen:
        lines += ["", "It was trained on top of other adapters, which are to be loaded, too, each at its strength:", ""]
        lines += [f"- {_adapter(each.path)} at strength {each.strength:g}" for each in settings.frozen]
        if any(form.exporter.format == "merged" for each in trained for form in each.forms):
            lines += ["", "The merged weights have them in them."]
    return "\n".join(lines) + "\n"


def _adapter(path: str) -> str:
    """How a card names an adapter: by its place on the Hub with a link, or by the name of its file alone."""
    if not is_on_hub(path):
        return _plain(Path(path).name)
    repository = "/".join(path.split("/")[:2])
    return f"[{_plain(path)}](https://huggingface.co/{repository})"


def _from_repository(line: str, to: Destination) -> str:
    """An exporter's line that loads a folder, as one that loads the same of the repository."""
    revision = f', revision="{to.revision}"' if to.revision != "main" else ""

    def loaded(found: re.Match[str]) -> str:
        subfolder = f', subfolder="{found[1]}"' if found[1] else ""
        return f'"{to.repo}"{subfolder}{revision}'

    return re.sub(rf'"{_MARK}/?([^"]*)"', loaded, line)


def _training(trained: Sequence[Trained], left_out: Sequence[str]) -> str:
    lines = ["## How it was trained", "", f"With finetune {finetune.__version__}, by [{RECIPE_FILE}]({RECIPE_FILE})."]
    if left_out:
        lines[-1] += f" Places on the machine are left out of it: {', '.join(f'`{key}`' for key in left_out)}."
    names = [each.family.expert or "" for each in trained]
    columns = [_facts(each) for each in trained]
    lines += ["", f"| | {' | '.join(f'{name}-noise expert' if name else '' for name in names)} |"]
    lines.append(f"|---|{'---|' * len(columns)}")
    for key in columns[0]:
        lines.append(f"| {key} | {' | '.join(column.get(key, '') for column in columns)} |")
    return "\n".join(lines) + "\n"


def _facts(each: Trained) -> dict[str, str]:
    """What one transformer was trained on and how, by what it is called in the card."""
    recipe = each.recipe
    data, train = recipe.data, recipe.train
    pieces = "clips" if data.window in ("head", "centre") else "pieces of clips"
    facts = {"steps": f"{ended_at(recipe)}", "samples of a step": f"{train.global_batch_size}"}
    if each.clips is not None:
        facts[pieces] = f"{each.clips}"
    facts["shapes (frames x height x width)"] = ", ".join(map(str, data.stated_buckets))
    if train.method == "lora" and recipe.adapter is not None:
        own = recipe.adapter.model_dump()
        facts |= {key: f"{own[key]:g}" for key in ("rank", "alpha") if key in own}
        kinds = {"rslora": "alpha / sqrt(rank)", "dora": "DoRA"}
        if kind := ", ".join(text for key, text in kinds.items() if own.get(key)):
            facts["kind"] = kind
    if recipe.ema.decay is not None and "export" in recipe.ema.use:
        facts["weights"] = f"their moving average, decay {recipe.ema.decay:g}"
    if recipe.objective.loss != "mse":
        facts["loss"] = f"{recipe.objective.loss}, delta {recipe.objective.loss_delta:g}"
    optimizer = recipe.optimizer.model_dump()
    facts["optimizer"] = str(optimizer.get("name", "")) + (f", lr {optimizer['lr']:g}" if "lr" in optimizer else "")
    facts["schedule"] = recipe.schedule.name
    facts["precision"] = f"{train.precision}, trained weights in {train.weights}"
    if each.family.expert is not None:
        low, high = recipe.objective.sigma_range or each.family.experts[each.family.expert].noise_range
        facts["noise levels (sigma)"] = f"{low:g} to {high:g}"
    return facts


def _losses(trained: Sequence[Trained]) -> str:
    measured = [each for each in trained if each.heldout]
    if not measured:
        return ""
    settings = measured[0].recipe.adapter
    first = "the base model"
    if isinstance(settings, Lora) and settings.frozen:
        first += " with the adapters that it was trained on top of"
    if isinstance(settings, Lora) and settings.start_from is not None:
        first += f" with the adapter that was continued, {_adapter(settings.start_from)}"
    lines = ["## Held-out loss", "", f"On clips that were not trained on, at fixed noise; step 0 is {first}.", ""]
    for each in measured:
        if each.family.expert is not None:
            lines += [f"The {each.family.expert}-noise expert:", ""]
        lines += ["| step | loss | predicting zero |", "|---:|---:|---:|"]
        lines += [f"| {step} | {loss:.4f} | {zero:.4f} |" for step, loss, zero in _some(each.heldout)] + [""]
    return "\n".join(lines)


def _some(rows: list[tuple[int, float, float]]) -> list[tuple[int, float, float]]:
    """At most `_MOST_ROWS` rows, evenly chosen, the first and the last among them."""
    count = min(len(rows), _MOST_ROWS)
    return rows if count < 2 else [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _pictures(samples: Sequence[FinalSample], sheet: str | None) -> str:
    if sheet is None or not samples:
        return ""
    lines = [
        "## Samples",
        "",
        "Made after the last step with the recipe's prompts, all of them:",
        "",
        f"![samples]({SAMPLES}/{sheet})",
        "",
    ]
    is_told = any(each.strength is not None for each in samples)
    lines += (
        ["| prompt | seed | strength | |", "|---|---:|---:|---|"]
        if is_told
        else ["| prompt | seed | |", "|---|---:|---|"]
    )
    for each in samples:
        strength = f" {1 if each.strength is None else each.strength:g} |" if is_told else ""
        link = _link(each.file.name, Path(SAMPLES, each.file.name))
        lines.append(f"| {_plain(each.prompt)} | {each.seed} |{strength} {link} |")
    return "\n".join(lines) + "\n"


def _licence(to: Destination) -> str:
    of_base = f"that of [{to.base}](https://huggingface.co/{to.base})" if to.base else "that of the base model"
    named = to.licence.get("license_name") or to.licence.get("license")
    return f"## Licence\n\n{named or 'Not stated here'}: {of_base}, which these weights are made from.\n"


def _place(each: Trained, form: Form) -> Path:
    """Where a form's files lie in the repository: a LoRA in diffusers' form at the top, where loaders look for it."""
    method, expert = each.recipe.train.method, each.family.expert
    if form.folder.name == exporter_of(method).folder(each.family):  # whose names say which expert they are for
        return Path() if method == "lora" else Path(form.folder.name)
    return Path(expert or "", form.folder.name)


def _link(text: str, target: Path) -> str:
    return f"[{_plain(text)}]({target.as_posix()})"


def _plain(text: str) -> str:
    """Text as Markdown shows it, in one line: neither HTML nor marks in it mean anything."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (OSError, SafetensorError):
        return {}
