"""The components of a checkpoint as a family uses them: which there are, which is trained, and how they are built and loaded."""

from copy import copy
from typing import Any, ClassVar, NamedTuple, Self

import diffusers
import torch
from torch import nn

from finetune.models.building import without_weights
from finetune.models.folder import ModelFolder
from finetune.models.weights import Weights
from finetune.recipe.schema import Data, ExpertName, Model
from finetune.runtime.errors import Problem


class Expert(NamedTuple):
    """One of several transformers that share the denoising of a video: its component, and its range of sigma."""

    component: str
    noise_range: tuple[float, float]


class Components:
    """The part of a family that knows the model's folder. The constructor reads only configs and a few small tensors."""

    name: ClassVar[str]
    title: ClassVar[str]  # the model's name in messages
    pipeline_classes: ClassVar[tuple[str, ...]]  # pipelines whose folders it accepts; the first one generates
    transformer_class: ClassVar[str]  # the diffusers class of the transformer
    # Names of sub-folders: which the folder must have, which it may have, and which of them is trained where there are no experts.
    components: ClassVar[tuple[str, ...]] = ("scheduler", "tokenizer", "text_encoder", "vae", "transformer")
    optional_components: ClassVar[tuple[str, ...]] = ()
    trained_components: ClassVar[tuple[str, ...]] = ("transformer",)
    text_components: ClassVar[tuple[str, ...]] = ("tokenizer", "text_encoder")
    vae_dtype: ClassVar[torch.dtype | None] = None  # precision of the VAE, whatever the recipe's is
    read_when_opened: ClassVar[tuple[str, ...]] = ()  # patterns of files that the constructor needs besides configs

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        # Whether batches have padded text at its full length: compiled graphs are for one length.
        self.keeps_text_length = False
        self.expert: ExpertName | None = None  # the name of the one that is trained
        self.last_image = False  # whether clips' last frames are conditions, too

    def on(self, folder: ModelFolder) -> Self:
        """The same family, which loads its components from another folder."""
        other = copy(self)
        other.folder = folder
        return other

    def of_expert(self, name: ExpertName) -> Self:
        """The same family, of which another expert is trained."""
        other = copy(self)
        other.expert = name
        return other

    def of_other_expert(self) -> Self | None:
        """The same family, of which the expert is trained that this one does not train; None if there are no experts."""
        other = next((name for name in self.experts if name != self.expert), None)
        return None if other is None else self.of_expert(other)

    @classmethod
    def refusal(cls, folder: ModelFolder) -> str | None:
        """Why a folder's checkpoint is none of this family's; None if it is."""
        if folder.pipeline_class in cls.pipeline_classes:
            return None
        return f"this is {folder.pipeline_class}, and family {cls.name!r} trains {' or '.join(cls.pipeline_classes)}"

    @classmethod
    def recipe_for(cls, folder: ModelFolder) -> str | None:
        """This project's recipe for a folder's checkpoint, such as "ltx_13b", without the method; None if not known."""
        return None

    @classmethod
    def needed_components(cls, folder: ModelFolder) -> list[str]:
        """The components that a folder must have: those of the family, and of the optional ones those that its index names."""
        return [*cls.components, *filter(folder.has, cls.optional_components)]

    def problems(self, model: Model, data: Data) -> list[Problem]:
        """What a recipe asks for that this checkpoint has not, and what the checkpoint lacks in itself."""
        found = []
        if model.experts and not self.experts:
            name = self.recipe_for(self.folder)
            cure = "remove it" + (
                f" (recipes/{name}_lora.toml and recipes/{name}_full.toml are for it)" if name else ""
            )
            cure += ", or set model.path to a checkpoint with two transformers (Wan 2.2 A14B)"
            found.append(Problem(f"this checkpoint of {self.title} has no experts", "model.experts", cure))
        if data.last_image is not None and (what := self.last_image_problem(data.last_image)):
            found.append(Problem(what, "data.last_image", "remove it"))
        return found

    def last_image_problem(self, wanted: bool) -> str | None:
        """Why clips' last frames cannot be conditions, or have to be; None if the recipe's wish can be met."""
        return f"{self.title} takes no last image" if wanted else None

    def select(self, model: Model, data: Data) -> None:
        """Take what a recipe chooses of what this checkpoint can do."""
        if self.experts:
            self.expert = (model.experts or list(self.experts))[0]
        if data.last_image is not None:
            self.last_image = data.last_image

    @property
    def pipeline_class(self) -> str:
        """The diffusers class that generates with this checkpoint."""
        return self.pipeline_classes[0]

    @property
    def experts(self) -> dict[ExpertName, Expert]:
        """The transformers that share the denoising, by name, in the order in which they do; empty if one does all of it."""
        return {}

    @property
    def trained_component(self) -> str:
        """The component of the folder that is trained: where its config and weights lie, and what it is exported as."""
        if self.expert is not None:
            return self.experts[self.expert].component
        (component,) = self.trained_components
        return component

    @property
    def transformer_config(self) -> dict[str, Any]:
        """The trained component's config."""
        return self.folder.config(self.trained_component)

    # Loading

    def build_transformer(self, dtype: torch.dtype) -> nn.Module:
        """Build the transformer with its parameters on the meta device and its buffers on the CPU."""
        transformer = without_weights(self._transformer_class, self.transformer_config, dtype)
        return self.adapt_transformer(transformer)

    def adapt_transformer(self, transformer: nn.Module) -> nn.Module:
        """Change diffusers' module in place where training needs it, and return it. By default nothing is changed."""
        return transformer

    def without_gradient(self, transformer: nn.Module) -> list[nn.Parameter]:
        """The transformer's parameters that no loss reaches, in a batch of any kind. Full finetuning leaves them as they are."""
        return []

    def transformer_weights(self) -> Weights:
        """The pretrained transformer's tensors."""
        return self.folder.weights(self.trained_component)

    def empty_transformer(self) -> nn.Module:
        """The transformer on the meta device, without weights."""
        return self.build_transformer(torch.float32).to("meta")

    def load_vae(self, dtype: torch.dtype, tiling: bool) -> diffusers.ModelMixin:
        """Load the VAE onto the CPU. With `tiling` it encodes and decodes in overlapping tiles."""
        vae = self.folder.load("vae", getattr(diffusers, self.folder.class_name("vae")), self.vae_dtype or dtype)
        if tiling:
            vae.enable_tiling()
        return vae

    def load_scheduler(self) -> Any:
        """The diffusers scheduler that the checkpoint was saved with, for sampling."""
        return getattr(diffusers, self.folder.class_name("scheduler")).from_config(self.folder.config("scheduler"))

    def pipeline(self, **components: Any) -> diffusers.DiffusionPipeline:
        """The family's pipeline of these components, and None for the others."""
        cls = getattr(diffusers, self.pipeline_class)
        required, _ = cls._get_signature_keys(cls)
        if unknown := components.keys() - required:
            raise TypeError(f"{self.pipeline_class} has no {', '.join(sorted(unknown))}")
        return cls(**{name: components.get(name) for name in required}, **self.pipeline_options)

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """The options that the checkpoint's model_index.json sets for the pipeline, without its components."""
        cls, index = getattr(diffusers, self.pipeline_class), self.folder.index
        _, optional = cls._get_signature_keys(cls)
        return {name: index[name] for name in optional if name in index and not isinstance(index[name], list)}

    @property
    def _transformer_class(self) -> type[diffusers.ModelMixin]:
        return getattr(diffusers, self.transformer_class)

    def transformers_component(self, name: str, device: torch.device, dtype: torch.dtype) -> Any:
        """An encoder, tokenizer or processor of the class in transformers that the folder names. Encoders are on the device."""
        import transformers

        cls = getattr(transformers, self.folder.class_name(name))
        if not self.folder.has_weights(name):
            return cls.from_pretrained(self.folder.path / name)
        return self.folder.load(name, cls, dtype).to(device)
