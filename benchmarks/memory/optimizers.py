"""The memory that two CUDA-only optimizers take on a GPU: their storages as documented, without any arithmetic.

They stand in for `bitsandbytes.optim.AdamW8bit` 0.44 and `torchao.prototype.low_bit_optim.CPUOffloadOptimizer`
0.6, the releases of autumn 2024.
"""

from collections.abc import Iterable

import torch
from torch import nn

_SMALL = 4096  # elements; with fewer, both treat a parameter like plain AdamW


class AdamW8bitStorages(torch.optim.Optimizer):
    """The storages of bitsandbytes/optim/optimizer.py, `Optimizer2State.init_state`.

    Each parameter has two moments of one byte per element, with a float32 maximum for every 256 elements (release notes of
    0.44.0). All share two float32 maps of 256 values. Small parameters have float32 moments.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(list(parameters), {})
        self._maps: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter not in self.state:
                self.state[parameter] = self._moments(parameter)

    def _moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        if parameter.numel() < _SMALL:
            return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
        if not self._maps:
            self._maps = [torch.zeros(256, device=parameter.device) for _ in range(2)]
        blocks = -(-parameter.numel() // 256)
        state = {name: torch.zeros_like(parameter, dtype=torch.uint8) for name in ("state1", "state2")}
        return state | {name: torch.zeros(blocks, device=parameter.device) for name in ("absmax1", "absmax2")}


class OffloadedStorages(torch.optim.Optimizer):
    """The storages of torchao/prototype/low_bit_optim/cpu_offload.py with `offload_gradients=True`.

    A gradient leaves the device as soon as it is complete, and moments are in host memory. Small parameters have an AdamW
    of their own on the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: object) -> None:
        super().__init__(list(parameters), {})
        mine = self.param_groups[0]["params"]
        small = [parameter for parameter in mine if parameter.numel() < _SMALL]
        self.small = torch.optim.AdamW(small, **options) if small else None
        for parameter in mine:
            if parameter.numel() >= _SMALL:
                parameter.register_post_accumulate_grad_hook(_drop_gradient)

    def step(self) -> None:
        if self.small:
            self.small.step()


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
