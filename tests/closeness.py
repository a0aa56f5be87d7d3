"""How near tensors must be that two paths compute by sums of their own, or by one sum in another order."""

import torch
from torch import Tensor

FLOAT32 = 1e-5  # of the largest element; seen are up to 4e-6, of a decoded video, and 2e-6 of gradients


def assert_close_to_scale(ours: Tensor, theirs: Tensor, relative: float = FLOAT32, name: str = "") -> None:
    """Equal in shape and dtype, and nowhere further apart than `relative` of the largest element of `theirs`.

    Sums round by the size of what they add up, which the largest element tells. An element whose summands cancel is small
    beside that, so how far it is off relative to itself is chance, and another on every processor.
    """
    scale = theirs.abs().max().item() if theirs.numel() else 0.0
    named = (lambda text: f"{name}: {text}") if name else None
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * scale, msg=named)
