"""How a run is judged: the recipe's [validation], and the prompts in it."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from finetune.recipe.table import Free, Table
from finetune.recipe.values import BucketText, PathText


class Prompt(Table):
    text: str
    """What to generate."""
    shape: BucketText | None = None
    """Frames x height x width; unset: the recipe's first bucket of several frames."""
    negative: str = ""
    """Negative prompt."""
    count: Annotated[int, Field(ge=1)] = 1
    """Videos of this prompt, with seeds seed, seed + 1, ..."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first video."""
    steps: Annotated[int, Field(ge=1)] = 30
    """Denoising steps."""
    guidance: Annotated[float, Field(ge=0)] | None = None
    """Guidance scale; unset: the pipeline's default."""
    guidance_2: Annotated[float, Field(ge=0)] | None = None
    """Wan 2.2 A14B: guidance scale of the low-noise expert; unset: `guidance` for both."""
    true_guidance: Annotated[float, Field(gt=1)] | None = None
    """HunyuanVideo: classifier-free guidance with the negative prompt, beside the embedded `guidance`."""
    image: str | None = None
    """Image-to-video: the condition image, a file, an http(s) address, or a video, whose first frame is taken."""
    last_image: str | None = None
    """The image that the video ends with, for models that are trained with data.last_image; the same."""
    fps: Annotated[float, Field(gt=0)] = 25.0
    """Frame rate of the video."""
    strength: float | Annotated[list[float], Field(min_length=1)] = 1.0
    """How strongly the LoRA is applied, as diffusers does it; [0, 0.5, 1] makes a video with each. 0 is the base model."""
    control: bool = False
    """Watch what leaks: a prompt that has nothing of the dataset, nor its trigger word, and should look as it does without the
    LoRA. It is made without it, too, and the difference is told."""

    @property
    def strengths(self) -> list[float]:
        """Each strength once; a control prompt has 0, too."""
        given = self.strength if isinstance(self.strength, list) else [self.strength]
        return list(dict.fromkeys([0.0, *given] if self.control else given))

    @property
    def images(self) -> list[str]:
        """The condition images in their order: none, the first, or the first and the last."""
        return [image for image in (self.image, self.last_image) if image is not None]

    @property
    def seeds(self) -> range:
        """One for each video."""
        return range(self.seed, self.seed + self.count)


def split_prompts(value: Any) -> Any:
    """finetrainers' form, `prompt@@@49x512x768:::prompt` with or without shapes, as tables; other values as they are."""
    if not isinstance(value, str):
        return value
    parts = [part.strip().partition("@@@") for part in value.split(":::") if part.strip()]
    return [{"text": text.strip(), **({"shape": shape.strip()} if mark else {})} for text, mark, shape in parts]


class Validation(Table):
    every: Annotated[int, Field(ge=1)] | None = Free(None)
    """Measure the held-out loss each this many steps; unset: at the start and the end. Needs `heldout` or `heldout_clips`."""
    heldout: PathText | None = Free(None)
    """A dataset like `data.path`, never trained on, for the held-out loss."""
    heldout_clips: Annotated[int, Field(ge=0)] = 0
    """Instead: take this many clips out of `data.path`, chosen by their content and the seed."""
    sigmas: Annotated[int, Field(ge=1)] = Free(4)
    """The held-out loss is measured at this many fixed quantiles of sigma."""
    patience: Annotated[int, Field(ge=1)] | None = Free(None)
    """End the training once the held-out loss has been measured this many times in a row without a new least one; unset: never."""
    samples_every: Annotated[int, Field(ge=1)] | None = Free(None)
    """Generate the prompts each this many steps; unset: at the start and the end."""
    samples_at_start: bool = Free(True)
    """Generate them before the first step, too: what the base model makes of them."""
    samples_at_end: bool = Free(True)
    """Generate them after the last step, too."""
    tiling: bool = Free(True)
    """Decode samples in overlapping tiles where they are larger than one: much less memory, slightly different pictures."""
    prompts: Annotated[list[Prompt], BeforeValidator(split_prompts)] = Free([])
    """What to generate, as tables or as one string "prompt@@@49x512x768:::prompt..."."""
    prompts_file: PathText | None = Free(None)
    """More of them from a .txt (one a line), .toml, .json or .jsonl file."""
