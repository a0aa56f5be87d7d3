"""Decodes the masks that weigh the loss of clips: videos or images, of which white is what counts."""

import numpy as np

from finetune.data.sources import SourceFile

_LUMA = (299, 587, 114)  # thousandths of red, green and blue (ITU-R BT.601), as in PIL's mode "L"


def decode_mask(file: SourceFile) -> np.ndarray:
    """A mask at its clip's times, in its clip's bucket, as the luma of its pictures.

    Returns:
        uint8 (F, H, W), 0 is out of the loss and 255 counts in full; (1, H, W) of an image, which holds for all frames.
    Raises:
        UserError: the file cannot be read.
    """
    # Frame by frame, since the product is four times as large.
    return np.stack([((frame.astype(np.int32) @ _LUMA + 500) // 1000).astype(np.uint8) for frame in file.frames()])
