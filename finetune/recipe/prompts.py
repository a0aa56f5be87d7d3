"""Reads validation prompts from a file, or from one string in finetrainers' form: `prompt@@@49x512x768:::prompt...`."""

import difflib
import json
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from finetune.recipe.bucket import Bucket
from finetune.recipe.text import load_json, read_utf8
from finetune.recipe.validation import Prompt, Validation, split_prompts
from finetune.recipe.values import BucketText
from finetune.runtime.errors import Problem, UserError

# finetrainers' names in a JSON file of validation prompts
_NAMES = {
    "caption": "text",
    "prompt": "text",
    "negative_prompt": "negative",
    "image_path": "image",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance_2",
    "frame_rate": "fps",
}
_SIZES = ("num_frames", "height", "width")


class ResolvedPrompt(Prompt):
    """A prompt whose shape is known."""

    shape: BucketText

    @classmethod
    def of(cls, prompt: Prompt, default: Bucket) -> "ResolvedPrompt":
        """The same prompt, with the shape `default` if it has none."""
        values = {name: getattr(prompt, name) for name in prompt.model_fields_set}
        return cls.model_construct(**(values | {"shape": prompt.shape or default}))


def validation_prompts(settings: Validation, default: Bucket) -> list[ResolvedPrompt]:
    """The recipe's prompts and those of its prompts file. Prompts without a shape get `default`.

    Raises:
        UserError: the file is missing, or one of its entries is wrong.
    """
    prompts = [*settings.prompts, *(read_prompts(settings.prompts_file) if settings.prompts_file else [])]
    return [ResolvedPrompt.of(prompt, default) for prompt in prompts]


def read_prompts(path: Path) -> list[Prompt]:
    """Read the prompts in a .txt file (one per line, or in finetrainers' form), or in a .toml, .json or .jsonl file.

    Keys are those of a recipe, or finetrainers' own.

    Raises:
        UserError: the file is missing, has no prompts, or an entry is wrong.
    """
    try:
        entries = _READERS[path.suffix.lower()](read_utf8(path))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", "mend validation.prompts_file", str(path)) from None
    except KeyError:
        raise UserError("unknown kind of file", f"use one of {', '.join(_READERS)}", str(path)) from None
    except (ValueError, TypeError, RecursionError) as error:  # from reading JSON, TOML or UTF-8
        raise UserError(f"cannot be read ({error})", "mend the file", str(path)) from None
    prompts, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            prompts.append(_encodable(Prompt.model_validate(_renamed(entry))))
        except UnicodeEncodeError:
            what, cure = "has half a character (a lone \\ud... in JSON)", "write the character itself, or both halves"
            problems.append(Problem(what, f"{path}, prompt {number}", cure))
        except ValidationError as error:
            for detail in error.errors():
                problems.append(_problem(detail, f"{path}, prompt {number}"))
    if problems:
        raise UserError.of(problems)
    if not prompts:
        raise UserError("there is no prompt in it", "add one, or remove validation.prompts_file", str(path))
    return prompts


def comments_of(path: Path) -> int:
    """How many lines of a .txt file of prompts are comments: those that begin with "#"."""
    if path.suffix.lower() != ".txt":
        return 0
    return sum(line.startswith("#") for line in read_utf8(path).split("\n"))


def _encodable(prompt: Prompt) -> Prompt:
    """The prompt itself. Raises UnicodeEncodeError for text that no tokenizer takes."""
    prompt.text.encode()
    (prompt.negative or "").encode()
    return prompt


def _problem(detail: Any, where: str) -> Problem:
    key = ".".join(map(str, detail["loc"]))
    if detail["type"] != "extra_forbidden":
        return Problem(f"{key}: {detail['msg']}" if key else detail["msg"], where, "mend this prompt")
    near = difflib.get_close_matches(key, Prompt.model_fields, n=1)
    return Problem(
        f"unknown key {key!r}",
        where,
        f"did you mean {near[0]!r}?" if near else f"keys are: {', '.join(Prompt.model_fields)}",
    )


def _renamed(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    renamed = {_NAMES.get(key, key): value for key, value in entry.items() if key not in _SIZES and value is not None}
    if any(entry.get(size) for size in _SIZES):
        renamed["shape"] = "x".join(str(entry.get(size, "?")) for size in _SIZES)  # "?" is refused
    return renamed


def _entries(value: Any) -> list[Any]:
    """The list of prompts in a JSON or TOML file: the whole file, or under "prompts" or finetrainers' "data"."""
    if isinstance(value, dict):
        value = value.get("validation", value)  # as in a recipe
    found = value.get("prompts", value.get("data")) if isinstance(value, dict) else value
    if not isinstance(found, list):
        raise ValueError('no list of prompts in it: name it "prompts"')
    return found


def _json_line(number: int, line: str) -> Any:
    try:
        return load_json(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}: {error.msg}, at character {error.pos + 1}") from None


_READERS = {
    ".txt": lambda text: [
        entry for line in text.split("\n") if not line.startswith("#") for entry in split_prompts(line.strip())
    ],
    ".json": lambda text: _entries(load_json(text)),
    ".jsonl": lambda text: [
        _json_line(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
    ],
    ".toml": lambda text: _entries(tomli.loads(text)),
}
