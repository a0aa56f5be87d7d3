"""The table [data] of a recipe, and the datasets in it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from finetune.recipe.bucket import Bucket
from finetune.recipe.choices import BadClips, Window
from finetune.recipe.table import Free, Table
from finetune.recipe.values import AreaText, BucketText, PathText

_LEAST_REPEATS = 0.001  # one sample of a thousand clips in each epoch


class DataSource(Table):
    path: PathText = Free(...)
    """As `data.path`."""
    repeats: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """How often an epoch takes each of its clips. Of a fraction, like 0.25 or 2.5, every epoch takes another share, so that all
    clips are taken equally often; 0 leaves the source out."""
    video_column: str | None = None
    """Unset: `data.video_column`."""
    caption_column: str | None = None
    """Unset: `data.caption_column`."""
    id_token: str | None = None
    """Unset: `data.id_token`."""

    @field_validator("repeats")
    @classmethod
    def _some_or_none(cls, repeats: float) -> float:
        if 0 < repeats < _LEAST_REPEATS:
            raise ValueError(f"the least is {_LEAST_REPEATS}; 0 leaves the source out")
        return repeats


class Data(Table):
    path: PathText | None = Free(None)
    """A folder of videos and images with captions beside them, a folder with prompts.txt and videos.txt, or a .csv, .tsv, .json,
    .jsonl or .parquet file, or a folder with such a file named metadata."""
    sources: list[DataSource] = Field(default=[])
    """Instead of `path`: several datasets, each a table [[data.sources]]."""
    buckets: list[BucketText] = Field(default=[])
    """Training shapes, frames x height x width, like ["49x512x768"]. Each clip goes to the one that fits it best."""
    area: AreaText | None = None
    """Instead of `buckets`, with `frames`: a height x width, like "512x768". Shapes of about so many pixels, and no more, are found
    that fit the aspect ratios of the clips, and written into the recipe of the run; `buckets` beside it are taken as found."""
    frames: list[Annotated[int, Field(ge=1)]] = Field(default=[])
    """The lengths of these shapes, like [1, 17, 49]. Each clip has the longest that it can fill."""
    bucket_count: Annotated[int, Field(ge=1)] = 9
    """At most so many of these shapes have the same length."""
    video_column: str = "video"
    """Column (or text file of a folder) that holds the videos' paths. Where there is no "video", "file_name" is taken."""
    caption_column: str = "caption"
    """Column (or text file of a folder, or key of .json files beside clips) that holds the captions."""
    id_token: str = ""
    """A trigger word, put in front of every caption."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Resample clips to this frame rate; unset: every clip keeps its own."""
    window: Window = "head"
    """Which frames of a clip that is longer than its bucket are trained on."""
    windows: Annotated[int, Field(ge=1)] = 4
    """Pieces of each clip with window = "random", drawn once by the seed."""
    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a piece that the next one repeats, with window = "all"."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a sample is trained with the family's unconditional prompt, for classifier-free guidance."""
    image_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that an image-to-video sample is trained without its condition image."""
    last_image: bool | None = None
    """Image-to-video between two images: each clip's last frame is a condition, too; unset: as the checkpoint was made for."""
    background: Annotated[str, Field(pattern=r"^(white|black|grey|#[0-9A-Fa-f]{6})$")] = "white"
    """What is seen where an image is transparent: "white", "black", "grey", or a colour like "#1a2b3c"."""
    bad_clips: BadClips = Free("refuse")
    """What to do with clips that cannot be decoded or fill no bucket."""
    cache: PathText = Free(Path("cache"))
    """Folder of encoded clips and captions. Content-addressed, so runs share it."""
    workers: Annotated[int, Field(ge=0)] = Free(2)
    """Loader processes per rank; 0 loads in the training process."""

    @model_validator(mode="after")
    def _says_where_and_how(self) -> "Data":
        if (self.path is None) == (not self.sources):
            what = "both `path` and [[data.sources]]" if self.sources else "no `path`"
            raise ValueError(f'{what}: write path = "...", or a table [[data.sources]] for each of several datasets')
        if self.sources and not any(source.repeats for source in self.sources):
            raise ValueError("every source has repeats = 0: give one of them more")
        self._check_shapes()
        return self

    def _check_shapes(self) -> None:
        """Raises ValueError unless the shapes are given, or how to find them; both are in a recipe for which they were found."""
        either = 'write buckets = ["49x512x768"], or area = "512x768" and frames = [17, 49], for which they are found'
        if self.area is None:
            for key in ("frames", "bucket_count"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"`{key}` has no effect without `area`: remove it, or {either}")
            if not self.buckets:
                raise ValueError(f"no training shapes: {either}")
        elif not self.frames:
            raise ValueError("`area` without `frames`: write the lengths, too, like frames = [17, 49]")
        elif other := [bucket for bucket in self.buckets if not self._may_be_found(bucket)]:
            what = f"{other[0]} in `buckets` is not of the lengths in `frames`, or larger than `area`"
            raise ValueError(f"{what}: remove `buckets`, which are then found, or `area` and `frames`")

    def _may_be_found(self, bucket: Bucket) -> bool:
        height, width = self.area or (0, 0)
        return bucket.frames in self.frames and bucket.height * bucket.width <= height * width

    @property
    def stated_buckets(self) -> list[Bucket]:
        """`buckets`; as long as they are not found, the shape of `area` in each length, the longest first: it is the largest."""
        lengths = sorted(set(self.frames), reverse=True)
        return self.buckets or [Bucket(length, *self.area) for length in lengths if self.area]

    @property
    def sample_shape(self) -> Bucket:
        """The shape of samples whose prompt names none: the first of the buckets that is of several frames, if any is."""
        return next((bucket for bucket in self.stated_buckets if bucket.frames > 1), self.stated_buckets[0])

    @property
    def datasets(self) -> list[DataSource]:
        """Every dataset to train on."""
        return self.sources or [DataSource(path=self.path or Path())]

    @property
    def used_datasets(self) -> list[tuple[int, DataSource]]:
        """The datasets that an epoch takes clips of, each with its number among all."""
        return [(number, source) for number, source in enumerate(self.datasets) if source.repeats]

    def reading(self, source: DataSource) -> dict[str, str]:
        """How a dataset is read: its columns and its trigger word."""
        own = {key: getattr(source, key) for key in ("video_column", "caption_column", "id_token")}
        return {key: getattr(self, key) if value is None else value for key, value in own.items()}
