"""TensorBoard's event files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.runtime.files import writing
from finetune.tracking.media import animation
from finetune.tracking.names import grouped
from finetune.tracking.packages import imported


class TensorBoard:
    """Event files in `tensorboard/`: metrics in groups, the recipe as text, videos as animated pictures."""

    def __init__(self, folder: Path, recipe: str, first_step: int) -> None:
        """
        Args:
            recipe: its text.
            first_step: the step after which the run resumes; what is there of later steps is hidden.
        """
        writer = imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        with writing(folder):
            self.writer = writer(str(folder), purge_step=first_step + 1 if first_step else None)
            self.writer.add_text("recipe", f"```toml\n{recipe}\n```", first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(grouped(name), value, step)

    def log_videos(self, step: int, videos: Sequence[tuple[str, Path]], sheet: Path) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.writer.add_image("samples", np.asarray(Image.open(sheet)), step, dataformats="HWC")
        for _, path in videos:
            # torch's add_video would need moviepy to write the same: a GIF, which TensorBoard shows as it moves.
            data, width, height = animation(path)
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            self.writer.file_writer.add_summary(
                Summary(value=[Summary.Value(tag=f"samples/{path.stem}", image=image)]), step
            )

    def close(self, failed: bool) -> None:
        self.writer.close()
