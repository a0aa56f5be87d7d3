"""Images as condition images of prompts and as training data: from a file, an http(s) address, or a video's first frame.

`address` fetches, `opening` guards what a file may be and hold, `colours` converts to sRGB without transparency, and `fitting`
scales and crops to a bucket.
"""

from finetune.data.images.address import is_address
from finetune.data.images.fitting import IMAGE_DECODER, decode_image, probe_image
from finetune.data.images.loading import load_image, missing_image

__all__ = ["IMAGE_DECODER", "decode_image", "is_address", "load_image", "missing_image", "probe_image"]
