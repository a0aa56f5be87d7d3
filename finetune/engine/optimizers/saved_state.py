"""Loading an optimizer's state without changing where and in which dtype it is."""

from itertools import chain
from typing import Any

import torch


def load_as_saved(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state dict without casting the state to dtype and device of the parameters, as torch does."""
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for name, parameter in zip(saved, own, strict=True):
        if name in state_dict["state"]:
            optimizer.state[parameter] = dict(state_dict["state"][name])
