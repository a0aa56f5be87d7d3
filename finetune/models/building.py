"""Building a diffusers model from its config, without weights."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def without_weights(cls: type[diffusers.ModelMixin], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Build a model with its parameters on the meta device and its buffers on the CPU.

    Buffers are computed, because weight files do not contain the non-persistent ones (position embeddings, frequencies).

    Args:
        dtype: of parameters and saved buffers, but for those that the class keeps in float32.
    """
    before = torch.get_default_dtype()
    # torch's annotation omits what its documentation says: a hook may return another parameter.
    hook = register_module_parameter_registration_hook(_to_meta)  # type: ignore[arg-type]
    torch.set_default_dtype(dtype)  # as `from_pretrained` does
    try:
        with torch.random.fork_rng(devices=[]):  # small tables are drawn before they are registered
            model = cls.from_config(config)
    finally:
        torch.set_default_dtype(before)
        hook.remove()
    stays, saved = stays_float32(model), model.state_dict().keys()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in saved:  # as `from_pretrained` does; non-persistent buffers keep their dtype
            tensor.data = tensor.data.to(torch.float32 if stays(name) else dtype)
    return model


def stays_float32(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor of a model, by its name, is in float32 whatever the dtype of the others.

    The rule is that of `from_pretrained`: any part of the name is among the class's `_keep_in_fp32_modules`. It holds for an
    adapter of such a module, too: peft gives it the dtype of its layer.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return lambda name: not kept.isdisjoint(name.split("."))


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def replace_tensors(module: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Replace each parameter and buffer of a module by what `change` makes of it, in place; tied parameters stay tied.

    torch's own `.to`, `to_empty` and `_apply` change parameters in place, which works only between some kinds of devices. FSDP
    takes up replaced parameters before its first forward pass.

    Args:
        change: returns a new tensor, or the one that it was given.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in made:
                held = parameter.detach()
                changed = change(held)
                made[parameter] = parameter if changed is held else nn.Parameter(changed, parameter.requires_grad)
            owner._parameters[name] = made[parameter]
        for name, buffer in owner.named_buffers(recurse=False):
            owner._buffers[name] = change(buffer)
    return module
