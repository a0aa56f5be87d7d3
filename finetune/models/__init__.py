"""Model families: what each needs to be trained, one file a family.

A family of this project is a file here and a line in `FAMILIES`. Anybody else's is named by where it is defined, as
`package.module:Class`: a subclass of `finetune.models.family.Family` in any module that Python finds, the working
directory's among them.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from finetune.models.family import Family
from finetune.runtime.errors import Problem, UserError

FAMILIES = {
    "cogvideox": "finetune.models.cogvideox:CogVideoX",
    "cogvideox_i2v": "finetune.models.cogvideox:CogVideoXImageToVideo",
    "hunyuan": "finetune.models.hunyuan:HunyuanVideo",
    "hunyuan15": "finetune.models.hunyuan15:HunyuanVideo15",
    "hunyuan15_i2v": "finetune.models.hunyuan15:HunyuanVideo15ImageToVideo",
    "hunyuan_i2v": "finetune.models.hunyuan_i2v:HunyuanVideoImageToVideo",
    "ltx": "finetune.models.ltx:LTXVideo",
    "ltx_i2v": "finetune.models.ltx:LTXImageToVideo",
    "mochi": "finetune.models.mochi:Mochi",
    "wan": "finetune.models.wan:Wan",
    "wan_i2v": "finetune.models.wan:WanImageToVideo",
}
_KEY = "model.family"
_ATTRIBUTES = ("name", "title", "pipeline_classes", "transformer_class")  # of the class, without a default


def family_class(name: str) -> type[Family]:
    """The class of a family by its name in a recipe, or by `package.module:Class`.

    Raises:
        UserError: no such name or module or class, or a class that is not a whole family.
    """
    if is_outside(name):
        return _outside_class(name)
    if name not in FAMILIES:
        from_image = any(word in name.lower() for word in ("i2v", "image", "flf"))
        near = difflib.get_close_matches(name, [each for each in FAMILIES if from_image == ("i2v" in each)], n=1)
        own = ' (one of your own is "package.module:Class")'
        cure = f"did you mean {near[0]!r}?" if near else f"families are: {', '.join(FAMILIES)}{own}"
        if "." in name:
            likely = f"{name}:Class" if _is_module(name) else ":".join(name.rsplit(".", 1))
            cure = f'did you mean {likely!r}? A family of your own is "package.module:Class"'
        raise UserError(f"unknown family {name!r}", cure, _KEY)
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def is_outside(name: str) -> bool:
    """Whether a family's name says where it is defined, outside of this project."""
    return ":" in name


def code_of(family: Family) -> list[Path]:
    """The files of a family's class, and of those that it is derived from, without this project's."""
    bases = [base for base in type(family).__mro__ if base.__module__ != "builtins"]
    own = [base for base in bases if base.__module__.partition(".")[0] not in ("finetune", "abc")]
    return list(dict.fromkeys(Path(inspect.getfile(base)) for base in own))


def _is_module(name: str) -> bool:
    """Whether a dotted name is that of a module which can be found."""
    with suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def _outside_class(name: str) -> type[Family]:
    module_name, _, class_name = name.partition(":")
    if module_name.endswith(".py") and class_name.isidentifier():
        right = f"{module_name.removesuffix('.py').replace('/', '.')}:{class_name}"
        raise UserError(f"{name!r} names a file", f"write {right!r}", _KEY)
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise UserError(f"{name!r} does not name a class in a module", 'write "package.module:Class"', _KEY)
    module = _import(module_name)
    cls = getattr(module, class_name, None)
    if cls is None:
        known = [each for each, value in vars(module).items() if _is_family(value) and value is not Family]
        near = difflib.get_close_matches(class_name, known, n=1)
        cure = f"did you mean {near[0]!r}?" if near else f"families there are: {', '.join(known) or 'none'}"
        raise UserError(f"{module.__file__} has no {class_name!r}", cure, _KEY)
    if not _is_family(cls):
        cure = f"make it a subclass of it: class {class_name}(Family)"
        raise UserError(f"{name} is no finetune.models.family.Family", cure, _KEY)
    if problems := _contract_problems(cls, name):
        raise UserError.of(problems)
    return cls


def _is_family(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Family)


def _contract_problems(cls: type[Family], name: str) -> list[Problem]:
    """What a class lacks of a family's contract."""
    problems = []
    methods = [f"{each}()" for each in sorted(getattr(cls, "__abstractmethods__", ()))]
    if missing := methods + [each for each in _ATTRIBUTES if not hasattr(cls, each)]:
        cure = "define it as finetune/models/family.py says; finetune/models/hunyuan.py is a short example"
        problems.append(Problem(f"{name} does not define {', '.join(missing)}", _KEY, cure))
    if len(cls.trained_components) != 1:
        trained = ", ".join(cls.trained_components) or "no component"
        problems.append(Problem(f"{name} trains {trained}", _KEY, "name one in `trained_components`"))
    if unknown := [each for each in cls.trained_components if each not in cls.components]:
        cure = "name it in `components`, which lists what the model folder must have"
        problems.append(Problem(f"{name} trains {', '.join(unknown)}, and has no such component", _KEY, cure))
    return problems


def _import(name: str) -> ModuleType:
    """Import a module; other errors inside of it than of its syntax are raised as they are, for whoever has written it."""
    here = os.getcwd()
    if not {here, ""} & set(sys.path):
        sys.path.insert(0, here)  # as `python -m` has it; a console script has not
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        _not_found(name, error.name, here)
    except SyntaxError as error:
        what = f"{error.msg}: {(error.text or '').strip()}"
        raise UserError(what, "mend the line", f"{error.filename}, line {error.lineno}") from None
    except SystemExit as error:
        what = f"{name} ends the process when it is imported ({error})"
        raise UserError(what, "have it define the family only", _KEY) from None


def _not_found(name: str, missing: str, here: str) -> NoReturn:
    """Raise the UserError for `missing`, the part of the name that was not found."""
    package, _, last = missing.rpartition(".")
    if package:
        found = sys.modules[package]
        places = list(getattr(found, "__path__", [])) or [str(found.__file__)]
        looked = f"looked in {', '.join(places)}"
    else:
        places = [here]
        looked = f"looked in the working directory {here}, in PYTHONPATH and among the installed packages"
    near = difflib.get_close_matches(last, [module.name for module in pkgutil.iter_modules(places)], n=1)
    cure = f"did you mean {near[0]!r}?" if near else f"start the command in the folder that {last}.py or {last}/ is in"
    if package and not near:
        cure = f"mend the name, or write {last}.py there"
    raise UserError(f"no module named {missing!r} ({looked})", cure, _KEY) from None
