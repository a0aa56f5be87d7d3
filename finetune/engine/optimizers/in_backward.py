"""Updates in the backward pass (Lv et al. 2023, LOMO), with any optimizer that updates one parameter as it does all."""

from functools import partial

import torch
from torch import Tensor, nn

from finetune.engine.gradients import Norms


class InBackward:
    """Updates each parameter as soon as its gradient is whole, and drops the gradient. FSDP2 calls a sharded parameter's hooks
    after its reduction.

    One optimizer is kept, so schedule and checkpoints work as usual; during an update its groups are reduced to one parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.norms = Norms([parameter for group in optimizer.param_groups for parameter in group["params"]])
        self.before_first = lambda: None  # called before the first update of a step
        for index, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, index))

    def _update(self, index: int, parameter: nn.Parameter) -> None:
        if self.norms.add(parameter):
            self.before_first()
        groups = self.optimizer.param_groups  # load_state_dict puts other dictionaries in their place
        group = groups[index]
        whole = group["params"]
        self.optimizer.param_groups, group["params"] = [group], [parameter]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups, group["params"] = groups, whole
        parameter.grad = None

    def norm(self) -> Tensor:
        """Global L2 norm of the gradients since it was last asked for, over all ranks."""
        return self.norms.take()
