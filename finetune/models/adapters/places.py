"""Where an adapter lies: a file, a folder of peft or of a run of ours, or a repository on the Hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.models.family import Family
from finetune.runtime.download import one_file
from finetune.runtime.errors import UserError
from finetune.runtime.paths import NoSuchHome, expanded

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def file_of(name: str, family: Family) -> str:
    """The name of a file of trained weights; that of an expert says which one it is for."""
    return name if family.expert is None else name.replace(".", f"_{family.expert}_noise.", 1)


def lora_file(family: Family) -> str:
    """The name of an adapter's file in diffusers' form."""
    return file_of(LORA_FILE, family)


def find_adapter(path: str | Path, family: Family) -> tuple[Path, dict[str, Any] | None]:
    """(the file of an adapter, the settings of peft beside it, None if there are none).

    Args:
        path: see `read_adapter`.
    Raises:
        UserError: there is none, or several, or it is pickled.
    """
    if not str(path).strip():  # which would be the folder that the command is started in
        raise UserError(
            "an empty text names no adapter", "give a .safetensors file or a folder, or leave it out", "adapter"
        )
    try:
        local = expanded(str(path))
    except NoSuchHome as error:
        raise UserError(error.what, error.cure, str(path)) from None
    if local.is_dir():
        return _in_folder(local, family)
    if local.suffix in _PICKLED:
        what = "this is a pickle, which could run code as it is read"
        raise UserError(what, "convert it to safetensors with the tool that made it", str(path))
    if local.is_file():
        settings = local.parent / PEFT_SETTINGS
        return local, _json(settings) if local.name == PEFT_FILE and settings.is_file() else None
    if local.is_absolute() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(/.+)?", str(path)):
        cure = 'give a .safetensors file, a folder with one, or "owner/name/file.safetensors" on the Hub'
        raise UserError("there is no such adapter", cure, str(path))
    return _on_hub(str(path), family)


def _in_folder(folder: Path, family: Family) -> tuple[Path, dict[str, Any] | None]:
    folders = [folder, folder / "lora"]
    if family.expert is not None:
        folders += [folder / family.expert / "lora", folder / family.expert]
    for each in folders:
        if (each / PEFT_FILE).is_file():
            settings = each / PEFT_SETTINGS
            if not settings.is_file():
                what = f"there is no {PEFT_SETTINGS} beside {PEFT_FILE}, which has its alpha"
                raise UserError(what, "put it back", str(each))
            return each / PEFT_FILE, _json(settings)
        if (each / lora_file(family)).is_file():
            return each / lora_file(family), None
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(names) == 1:
        return folder / names[0], None
    raise _not_one(names, str(folder))


def _on_hub(path: str, family: Family) -> tuple[Path, dict[str, Any] | None]:
    from huggingface_hub import HfApi

    owner, name, *rest = path.split("/", 2)
    repository = f"{owner}/{name}"
    try:
        file = rest[0] if rest else _only_file(HfApi().list_repo_files(repository), family, path)
        settings = None
        if Path(file).name == PEFT_FILE:
            beside = str(Path(file).with_name(PEFT_SETTINGS))
            settings = _json(one_file(repository, beside))
        return one_file(repository, file), settings
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = f"neither a file or folder here nor reachable on the Hugging Face Hub ({reason})"
        raise UserError(what, "check the spelling and the network, or download it and give the file", path) from error


def _only_file(files: Sequence[str], family: Family, path: str) -> str:
    for name in (PEFT_FILE, lora_file(family)):
        if name in files:
            return name
    names = [file for file in files if file.endswith(".safetensors")]
    if len(names) != 1:
        raise _not_one(names, path)
    return names[0]


def _not_one(names: Sequence[str], path: str) -> UserError:
    if not names:
        return UserError("there is no .safetensors file in it", "give the file of an adapter", path)
    shown = ", ".join(names[:5])
    return UserError(f"there are {len(names)} .safetensors files in it", f"name one of them: {shown}", path)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"this file cannot be read ({error})", "download it again", str(file)) from None
    if not isinstance(value, dict):
        raise UserError("this file cannot be read (not a JSON object)", "download it again", str(file))
    return value
