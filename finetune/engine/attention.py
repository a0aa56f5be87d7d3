"""Which kernel computes the attention of the transformer's blocks, by torch's own selection.

Only the blocks use it: text encoders, the VAE and what stands before the blocks have masks and head sizes of their own.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

from finetune.recipe.schema import AttentionKernel
from finetune.runtime.device import Device
from finetune.runtime.errors import UserError

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
    "fa3": SDPBackend.FLASH_ATTENTION,  # versions 3 and 4 take the place of the flash kernel that is built into torch
    "fa4": SDPBackend.FLASH_ATTENTION,
}
# Parts of torch's error messages when no kernel fits: on GPUs, on CPUs, and from FlashAttention 3 and 4.
_NO_KERNEL = ("No available kernel", "No viable backend for scaled_dot_product_attention", "FA3 ", "FA4 ")


class ChosenAttention(ActivationWrapper):
    """A block whose attention is computed by one kernel.

    The wrapper is inside of checkpointing and compilation, so that recomputation and graphs choose the same. The backward
    pass of attention follows its forward pass. It does not show in the names of `state_dict`.
    """

    def __init__(self, block: nn.Module, backend: SDPBackend) -> None:
        super().__init__(block)
        self.backends = [backend]
        # A pipeline's prompts are padded, and the flash kernel takes no masks: those calls go to the second of these.
        flash = backend == SDPBackend.FLASH_ATTENTION
        self.backends_for_samples = [backend, SDPBackend.EFFICIENT_ATTENTION] if flash else self.backends

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        with sdpa_kernel(self.backends if torch.is_grad_enabled() else self.backends_for_samples):
            return self._checkpoint_wrapped_module(*arguments, **keywords)


def choose_kernel(lists: list[nn.ModuleList], kernel: AttentionKernel, masks_padding: bool, device: Device) -> None:
    """Wrap blocks in place, so that `kernel` computes their attention. "auto" leaves the choice to torch, but for masks.

    Args:
        masks_padding: whether padded text is masked in training; the number of tokens may then be any.
    Raises:
        UserError: torch cannot use the package of FlashAttention 3 or 4.
    """
    if kernel == "auto":
        if masks_padding:
            # cuDNN's gradient of the query may be NaN with a mask, if the number of keys is 64 modulo 128 (Hopper, from torch
            # 2.11 on, where it is the default: pytorch/pytorch#196678). No kernel beside it needs to be in its place.
            torch.backends.cuda.enable_cudnn_sdp(False)
        return
    if kernel in ("fa3", "fa4") and device.kind == "cuda":
        try:
            activate_flash_attention_impl(kernel.upper())
        except (ImportError, RuntimeError) as error:  # built for another torch, or without these kernels
            what = f"torch cannot use FlashAttention {kernel[-1]}: {error}"
            raise UserError(
                what, 'install it for this version of torch, or set it to "auto"', "memory.attention"
            ) from error
    for blocks in lists:
        for place, block in enumerate(blocks):
            blocks[place] = ChosenAttention(block, _BACKENDS[kernel])


def explained(error: Exception, kernel: AttentionKernel) -> UserError | None:
    """What torch's error means for the user if the chosen kernel cannot take what a model gives it; None for other errors."""
    lines = (line for line in str(error).splitlines() if any(mark in line for mark in _NO_KERNEL))
    if kernel == "auto" or (line := next(lines, None)) is None:
        return None
    return UserError(
        f'"{kernel}" cannot compute the attention of this model ({line.strip()}); torch\'s warnings say why',
        'set it to "auto"',
        "memory.attention",
    )
