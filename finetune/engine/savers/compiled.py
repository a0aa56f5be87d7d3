"""Blocks whose graphs torch.compile turns into kernels."""

import torch
from torch import nn

from finetune.runtime.device import Device

_GRAPHS = 256


def compile_blocks(lists: list[nn.ModuleList], device: Device) -> None:
    """Compile blocks in place. Blocks of one kind share their graphs: one a bucket for training, one more for the first of
    them, whose input needs no gradient, and one without gradients for validation.
    """
    # Past its limit, 8 by default, torch goes on without compiling, and does not say so.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    # inductor's kernels for CPUs get gradients through HunyuanVideo's attention wrong by some percent (torch 2.13).
    backend = "aot_eager" if device.is_cpu else "inductor"
    for blocks in lists:
        for block in blocks:
            block.compile(dynamic=False, backend=backend)  # graphs for any shape are slower, and not always right
