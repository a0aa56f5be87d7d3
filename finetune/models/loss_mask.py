"""The mask of a clip that weighs its loss: from the frames of a video to latent pixels, and from there to the loss's term.

The cached kind is "mask", with one tensor of this name. With squared errors e and the mask m, a sample's loss is sum(m e) / sum(m)
over all elements of its target. So a mask changes neither the size of the loss nor the learning rate that fits it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from finetune.models.sample import SampleLike
from finetune.runtime.errors import UserError

KIND = "mask"  # of the cached item, its tensor, the encoder's source, and the manifest's column
DARK = 8 / 255  # what is nowhere brighter is black: lossy codecs do not keep 0


def averaged(mask: Tensor, shape: tuple[int, int, int], temporal: int) -> Tensor:
    """The mean of a mask over the pixels and frames of each latent pixel: float32 (F', H', W') in [0, 1].

    Args:
        mask: uint8 (F, H, W), or (1, H, W) for a mask that holds for all frames.
        shape: (F', H', W') of the VAE's latents.
        temporal: video frames of each latent frame but the first, which is one video frame.
    """
    # Frame by frame, since a long clip takes gigabytes in float32.
    frames = torch.stack([interpolate(frame[None, None].float(), size=shape[1:], mode="area")[0, 0] for frame in mask])
    if len(mask) == 1:
        return (frames / 255).expand(shape).clone()
    groups = [1] + [temporal] * (shape[0] - 1)
    return torch.stack([group.mean(0) for group in frames.split(groups)]) / 255


def stacked(samples: Sequence[SampleLike], shape: Sequence[int]) -> Tensor | None:
    """The masks of samples, float32 (B, 1, F', H', W'); ones for a sample without. None if no sample has a mask.

    Args:
        shape: (F', H', W') of the latents.
    """
    if not any(KIND in sample.encoded for sample in samples):
        return None
    whole = torch.ones(*shape)
    return torch.stack([sample.encoded[KIND][KIND] if KIND in sample.encoded else whole for sample in samples])[:, None]


def combined(mask: Tensor, counted: Tensor | None) -> Tensor:
    """The weights of a target's elements: its mask, but 0 where the family does not count. Both are broadcastable to the target.

    Raises:
        UserError: nothing of a sample would count.
    """
    weights = mask if counted is None else mask * counted
    if not bool(weights.flatten(1).any(1).all()):
        raise UserError(
            "the mask of a clip is white only where the model is given the clip, so nothing of it would be trained on",
            "paint white what counts, or leave the clip's mask out",
            "the manifest's column 'mask'",
        )
    return weights
