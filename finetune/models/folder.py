"""A pipeline saved by diffusers: found on disk or fetched from the Hub, and checked before any weight is read."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from finetune.models.weights import Weights
from finetune.runtime.download import snapshot
from finetune.runtime.errors import Problem, UserError
from finetune.runtime.paths import NoSuchHome, expanded, looked_in

INDEX = "model_index.json"
CARD = "README.md"  # of a model, with its licence at the head
_CONFIGS = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "image_processor": "preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
    "guider": "guider_config.json",
}
_NOT_DOWNLOADED = ["*.bin", "*.msgpack", "*.bf16.*", "*.fp16.*", "*.bf16-*", "*.fp16-*"]  # other formats and precisions


class NotReached(UserError):
    """A pipeline is neither in the Hub's cache nor to be had from the Hub."""


class ModelFolder:
    """A folder saved by diffusers: `model_index.json`, and one sub-folder for each component.

    Its methods raise UserError if a JSON file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = _json(path / INDEX)

    @property
    def origin(self) -> list[str]:
        """Lines that say where the files are from, if that is not the folder that the recipe names; here none."""
        return []

    @property
    def pipeline_class(self) -> str:
        return self.index.get("_class_name", "unknown")

    def has(self, component: str) -> bool:
        """Whether the pipeline was saved with a component: one that it does without is null in the index."""
        entry = self.index.get(component)
        return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None

    def has_weights(self, component: str) -> bool:
        """Whether a component of this name has weights: tokenizers, schedulers and processors of images have none."""
        return _config_name(component) == "config.json"

    def class_name(self, component: str) -> str:
        """Name of the class that a component was saved from."""
        return self.index[component][1]

    def config(self, component: str) -> dict[str, Any]:
        """A component's config.json, or the file that its kind has in its place."""
        return _json(self.path / component / _config_name(component))

    def weight_files(self, component: str) -> list[Path]:
        """Paths of the component's weight files; its index lists them if it is sharded. Raises UserError if there are none."""
        folder = self.path / component
        for stem in ("diffusion_pytorch_model", "model"):
            shards = folder / f"{stem}.safetensors.index.json"
            if shards.is_file():
                weight_map = _json(shards).get("weight_map")
                if not isinstance(weight_map, dict):
                    raise UserError("this file has no weight_map", "download it again", str(shards))
                return [folder / name for name in sorted(set(weight_map.values()))]
            if (folder / f"{stem}.safetensors").is_file():
                return [folder / f"{stem}.safetensors"]
        raise UserError("there are no safetensors weights in it", "download the component again", str(folder))

    def problems(self, components: Sequence[str]) -> list[Problem]:
        """What is missing or damaged in components. Of weight files, only the headers are read."""
        found = []
        for component in components:
            if not self.has(component):
                found.append(
                    Problem(
                        f"{INDEX} names no {component!r}", str(self.path), "use a complete diffusers pipeline folder"
                    )
                )
                continue
            try:
                is_tokenizer = component.startswith("tokenizer")
                if not is_tokenizer:
                    self.config(component)
                files = self.weight_files(component) if self.has_weights(component) else []
            except UserError as error:
                found += error.problems
                continue
            found += [problem for file in files if (problem := _header_problem(file))]
            if is_tokenizer and not (self.path / component).is_dir():
                found.append(Problem("the folder is missing", str(self.path / component), "download it again"))
        return found

    def weights(self, component: str) -> Weights:
        """Open the component's tensors for reading in slices. Raises UserError if a file is damaged."""
        return Weights(self.weight_files(component))

    def load(self, component: str, cls: Any, dtype: torch.dtype) -> Any:
        """Load a component with its weights onto the CPU. `cls` is its class in diffusers or transformers."""
        return cls.from_pretrained(self.path / component, dtype=dtype)

    def tensor(self, component: str, name: str) -> Tensor:
        """Read one tensor of a component's weights. Raises UserError if there is no such tensor."""
        for file in self.weight_files(component):
            with safe_open(file, "pt") as weights:
                if name in weights.keys():  # noqa: SIM118 - not a dict
                    return weights.get_tensor(name)
        raise UserError(
            f"the weights have no tensor {name!r}", "use the family's own checkpoint", str(self.path / component)
        )

    def fingerprint(self, component: str, file_hash: Callable[[Path], str]) -> list[Any]:
        """JSON values that a component's output depends on: its config, and the hashes of its files."""
        if not self.has_weights(component):
            files = sorted(file for file in (self.path / component).iterdir() if file.is_file())
            return [[file.name, file_hash(file)] for file in files]
        config = {
            key: value
            for key, value in self.config(component).items()
            if key not in ("_name_or_path", "_diffusers_version", "transformers_version")
        }
        return [config, [file_hash(file) for file in self.weight_files(component)]]


def _config_name(component: str) -> str:
    """The file that a component's config is in. What has no weights has one of another name."""
    for name, file in _CONFIGS.items():
        if component.startswith(name):
            return file
    return "config.json"


def resolve(path: str, revision: str, patterns: Sequence[str]) -> Path:
    """The local folder of a pipeline. A pipeline on the Hub is downloaded into the Hub's cache first.

    Args:
        path: a folder, or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        patterns: which files to download from the Hub, besides the index.
    Raises:
        NotReached: it is no folder, and is not reachable on the Hub.
        UserError: it is a folder of something else, or nothing that the Hub could have.
    """
    try:
        local = expanded(path)
    except NoSuchHome as error:
        raise UserError(error.what, error.cure, path) from None
    if local.is_dir():
        if (local / INDEX).is_file():
            return local
        raise UserError(f"the folder has no {INDEX}", "use a pipeline saved by diffusers' save_pretrained", path)
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise UserError(
            f"no such folder{looked_in(local)}",
            'set model.path to a diffusers folder or a Hub id like "Lightricks/LTX-Video"',
            path,
        )
    try:
        return snapshot(path, revision, [INDEX, *patterns], _NOT_DOWNLOADED)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotReached(
            f"neither a folder here nor reachable on the Hugging Face Hub ({reason})",
            "check the spelling and the network; log in with `hf auth login` if the model is gated; "
            "or set model.path to a downloaded folder",
            path,
        ) from error


def _header_problem(file: Path) -> Problem | None:
    cure = "download it again"
    if not file.is_file():
        return Problem("this weight file is missing", str(file), cure)
    try:
        with safe_open(file, "pt") as weights:
            weights.keys()
    except (SafetensorError, OSError) as error:
        return Problem(f"this weight file is damaged ({error})", str(file), cure)
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("this file is missing", "download the model again, or mend model.path", str(path)) from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"this file cannot be read ({error})", "download it again", str(path)) from None
    if not isinstance(value, dict):
        raise UserError("this file cannot be read (not a JSON object)", "download it again", str(path))
    return value
