"""The parts of a run: what is saved with a checkpoint, follows the updates, and may be swapped for evaluation.

Weights and optimizer are parts. A further one, such as an average of the weights, joins the list `StepState.parts` before the
run resumes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from finetune.recipe.ema import Purpose

_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


class Part(ABC):
    """What the engine asks of a part, on every rank. A subclass may leave out the last two methods.

    Attributes:
        name: its key in a checkpoint, unique in a run and without a dot.
        is_evaluated: whether it changes the weights that are evaluated and exported: an export reads its state, too.
    """

    name: str
    is_evaluated: bool = False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: DTensors as they are sharded, or small values that can be pickled.

        Before loading, tensors of the same shapes: they are filled in place, and handed to `load_state_dict`.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a checkpoint."""

    def after_step(self, step: int) -> None:
        """Follow an update. It is called once a step, counted from 0, and not after a step that made no update."""
        return

    def evaluating(self, purpose: Purpose) -> AbstractContextManager[None]:
        """Surrounds held-out losses, samples and exports, on all ranks.

        A part may change the trained parameters in place here, and must change them back: gradients are off, and what FSDP
        has gathered of the changed ones is dropped at the end, since the weights' own context is the outermost.
        """
        return nullcontext()


class TrainedWeights(Part):
    """The parameters that are trained, and the buffers of their modules."""

    name = "model"
    is_evaluated = True

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.transformer, options=_TRAINED_ONLY)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.transformer, state, options=_TRAINED_ONLY)

    @contextmanager
    def evaluating(self, purpose: Purpose) -> Iterator[None]:
        """Without gradients and dropout; afterwards in training mode, with no more than its shards in memory."""
        self.transformer.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.transformer.train()
            reshard(self.transformer)


def reshard(transformer: nn.Module) -> None:
    """Free what a forward pass leaves gathered, as a backward pass would have done."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class OptimizerState(Part):
    """The optimizer's state of each trained parameter, by the parameter's name."""

    name = "optimizer"

    def __init__(self, transformer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.transformer, self.optimizer = transformer, optimizer
        self.is_evaluated = isinstance(optimizer, _Evaluated)

    def state_dict(self) -> dict[str, Any]:
        if not self.optimizer.state:
            _begin(self.optimizer)
        return get_optimizer_state_dict(self.transformer, self.optimizer, options=_TRAINED_ONLY)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self.transformer, self.optimizer, state, options=_TRAINED_ONLY)

    def evaluating(self, purpose: Purpose) -> AbstractContextManager[None]:
        """An optimizer may train other weights than it is evaluated by, as a schedule-free one, which averages them."""
        return self.optimizer.evaluating() if isinstance(self.optimizer, _Evaluated) else nullcontext()


@runtime_checkable
class _Evaluated(Protocol):
    """An optimizer that has weights of its own for evaluation."""

    def evaluating(self) -> AbstractContextManager[None]: ...


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of an optimizer that has made no step, which changes no parameter.

    torch would do so with the gradients of all parameters in memory together, for which there may be no room.
    """
    kept = [dict(group) for group in optimizer.param_groups]  # some optimizers count steps there
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        parameter.grad = None
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)


@contextmanager
def evaluating(parts: Sequence[Part], purpose: Purpose) -> Iterator[None]:
    """All parts as they are to be evaluated for a purpose. The first one is the weights."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.evaluating(purpose))
        yield
