"""Optimizers that are lent tensors they can work with: whole matrices for shards, float32 for bf16.

Some optimizers look at a whole matrix (the norm of its rows, its singular values), and torch's refuse shards of one. None but
torchao's rounds a bf16 weight stochastically, without which small updates are lost. So the optimizer is lent a copy, and what
becomes of the copy is written back.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from finetune.engine.gradients import local
from finetune.engine.optimizers.saved_state import load_as_saved

Lot = tuple[dict[str, Any], list[nn.Parameter]]  # a group, and those of its parameters that are updated


class Lender(torch.optim.Optimizer):
    """Makes another optimizer's updates on what it is lent; lends a parameter itself where nothing needs to be copied.

    Groups and state belong to this optimizer. State of a parameter's shape is divided as the parameter is.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *,
        whole: bool = False,
        together: bool = False,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            inner: has been built for the same parameters; is lent plain tensors, of float32.
            whole: lend whole matrices in place of this rank's shards. `step` is then collective.
            together: lend all parameters at once, for an optimizer whose update of one depends on the others. It may write to
                its groups; its state is then whole on each rank.
            state_dtype: in which state of a parameter's shape is kept between steps; bf16 is rounded stochastically.
        """
        super().__init__(inner.param_groups, inner.defaults)
        self._inner, self._whole, self._together, self._state_dtype = inner, whole, together, state_dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None  # this project's steps have none
        lots = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        if self._together:
            self._update(lots)
            return
        for group, parameters in lots:
            for parameter in parameters:
                self._update([(group, [parameter])])

    def _update(self, lots: list[Lot]) -> None:
        inner, lent = self._inner, {}
        inner.state.clear()
        for parameter in (parameter for _, parameters in lots for parameter in parameters):
            lent[parameter] = copy = self._lend(parameter.detach())
            assert parameter.grad is not None  # else there would be nothing to update
            copy.grad = self._lend(parameter.grad)
            if parameter in self.state:
                inner.state[copy] = {name: self._lend_value(value) for name, value in self.state[parameter].items()}
        inner.param_groups = [{**group, "params": [lent[p] for p in parameters]} for group, parameters in lots]
        inner.step()
        if self._together:
            for (group, _), used in zip(lots, inner.param_groups, strict=True):
                group.update({name: value for name, value in used.items() if name != "params"})
        for parameter, copy in lent.items():
            if not self._lends_itself(parameter):
                _write(local(parameter), self._own_part(copy, parameter))
            self._keep(parameter, inner.state[copy])
        inner.state.clear()

    def _lends_itself(self, tensor: Tensor) -> bool:
        return tensor.dtype is torch.float32 and not (self._whole and is_divided(tensor))

    def _lend(self, tensor: Tensor) -> Tensor:
        """A plain tensor in float32: the whole, or this rank's part."""
        part = tensor.full_tensor() if self._whole and is_divided(tensor) else local(tensor)  # type: ignore[attr-defined]  # a DTensor's
        return part.float()

    def _lend_value(self, value: Any) -> Any:
        return self._lend(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def _keep(self, parameter: nn.Parameter, state: dict[str, Any]) -> None:
        """Take up the state that an update has left."""
        shape, kept = (parameter if self._whole else local(parameter)).shape, self.state[parameter]
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != shape or self._together or not value.dim():
                kept[name] = value
                continue
            if is_new := name not in kept:
                kept[name] = torch.empty_like(parameter, dtype=self._state_dtype)
            if is_new or not self._lends_itself(kept[name]):
                _write(local(kept[name]), self._own_part(value, parameter))

    def _own_part(self, whole: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of what was lent."""
        if not (self._whole and is_divided(parameter)):
            return whole
        assert isinstance(parameter, DTensor)
        # Without a source rank nothing is sent: each takes its part of its own copy.
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State stays in its dtype: torch casts it to that of the weights."""
        load_as_saved(self, state_dict)


def is_divided(tensor: Tensor) -> bool:
    """Whether several ranks hold different parts of it. Equal on all of them."""
    if not isinstance(tensor, DTensor):
        return False
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate()) > 1


def _write(kept: Tensor, value: Tensor) -> None:
    """Write float32 values to a tensor of the same shape; if it is bf16, rounded stochastically with torch's own generator."""
    if kept.dtype is torch.bfloat16:
        from torchao.optim.quant_utils import _fp32_to_bf16_sr

        value = _fp32_to_bf16_sr(value)
    kept.copy_(value)
