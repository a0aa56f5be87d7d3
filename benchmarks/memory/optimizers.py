"""What two optimizers keep on a GPU, which themselves run on CUDA only: their storages as documented, no arithmetic.

A Python sketch of the memory of `bitsandbytes.optim.AdamW8bit` 0.44 and `torchao.prototype.low_bit_optim.CPUOffloadOptimizer`
0.6, the releases of autumn 2024.
"""

from collections.abc import Iterable

import torch
from torch import nn

_SMALL = 4096  # elements below which both keep a parameter as plain AdamW does


class AdamW8bitStorages(torch.optim.Optimizer):
    """bitsandbytes/optim/optimizer.py, `Optimizer2State.init_state`: two moments of a byte an element, a float32 maximum of each
    256 elements (release notes of 0.44.0), and two float32 maps of 256 values for all; smaller parameters have float32 moments.
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
    """torchao/prototype/low_bit_optim/cpu_offload.py with `offload_gradients=True`: a gradient leaves the device as soon as it is
    there, moments are in host memory; smaller parameters have an AdamW of their own on the device.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **options: object) -> None:
        super().__init__(list(parameters), {})
        mine = self.param_groups[0]["params"]
        small = [parameter for parameter in mine if parameter.numel() < _SMALL]
        self.small = torch.optim.AdamW(small, **options) if small else None
        for parameter in mine:
            if parameter.numel() >= _SMALL:
                parameter.register_post_accumulate_grad_hook(_leave)

    def step(self) -> None:
        if self.small:
            self.small.step()


def _leave(parameter: nn.Parameter) -> None:
    parameter.grad = None
