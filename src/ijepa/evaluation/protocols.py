"""Protocols of evaluation: all settings that determine a result, typed, in YAML files, and part of every result.

`load_protocol` reads the protocols of all kinds: a preset in `protocols/KIND/` by its name, or the user's YAML file,
which may build on a preset with `base: NAME`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ijepa.config.files import preset_names, read_yaml
from ijepa.data.loading.crop import Interpolation
from ijepa.evaluation.classification.linear_heads import Norm
from ijepa.evaluation.classification.optimizers import OptimizerName
from ijepa.evaluation.features.precision import Autocast
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.config import BaseConfig, Shares
from ijepa.utils.errors import UserError

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class ImageProtocol(BaseConfig):
    """Fields that all protocols of image classification share."""

    name: str
    """Name of the protocol in results."""
    description: str = ""
    """Description: the published protocol that it follows, and the differences."""
    image_size: int | None = Field(None, ge=1)
    """Side length of the images in pixels; null: the native size of the encoder."""
    crop_fraction: float = Field(0.875, gt=0, le=1)
    """Share of the short side that the central crop keeps; 0.875 is "resize to 256, crop 224"."""
    interpolation: Interpolation = "bilinear"
    """Antialiased filter that resizes train and test images: bilinear or bicubic."""
    train_images: int | None = Field(None, ge=2)
    """Largest number of train images, selected by the seed; null: all."""
    test_images: int | None = Field(None, ge=1)
    """Largest number of test images, selected by the seed; null: all."""
    forward_batch: int = Field(64, ge=1)
    """Number of images per forward pass of the encoder."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto (bf16 on a GPU, float32 on a CPU)."""


class LinearProtocol(ImageProtocol):
    """A linear or attentive probe: many heads on frozen features are trained in one pass, and one of them is chosen."""

    head: Literal["linear", "attentive", "query"] = "linear"
    """Type of head. linear: reads mean patches; query: pools the patches of the last block by a learned query;
    attentive: the same by a cross-attention block with MLP."""
    attention_heads: int | None = Field(None, ge=1)
    """Number of attention heads of a pooling head. null: as many as the encoder has (attentive), or one for every 64
    channels (query)."""
    clip: float | None = Field(None, gt=0)
    """Largest norm of the gradient of a pooling head, to which it is clipped; null: no clipping."""
    final_weight_decay: float | None = Field(None, ge=0)
    """Weight decay of a pooling head at the end, which a cosine schedule reaches; null: weight decay is constant."""
    blocks: tuple[Count, ...] = Field((1, 4), min_length=1)
    """Numbers of last blocks whose mean patches are concatenated; there is one group of heads for each number."""
    norms: tuple[Norm, ...] = Field(("none",), min_length=1)
    """Normalization before the linear layer: none, batch (batch norm without gain and offset), or batch-affine (with
    both)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the batch norm."""
    norm_batch: int | None = Field(None, ge=2)
    """Number of images over which a batch norm computes its statistics, as those on one device or machine; null: all
    images of the step."""
    lrs: tuple[Positive, ...] = Field(min_length=1)
    """Peak learning rates per 256 images in a step. There is one head for each combination of rate, weight decay and
    norm."""
    weight_decays: tuple[NotNegative, ...] = Field(min_length=1)
    """Weight decays, decoupled for AdamW. Norms have no weight decay."""
    decay_bias: bool = False
    """Apply weight decay to the biases of linear heads as well."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw, sgd or lars."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moment estimates of AdamW."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    initial_std: NotNegative | Literal["linear"] = 0.0
    """Standard deviation of the initial weights of a linear head; its biases start at 0.

    With 0 the weights start at zero, which is fine for a convex problem. linear: weights and biases start as those of
    torch.nn.Linear, uniform within 1 / sqrt(features)."""
    batch: int = Field(1024, ge=1)
    """Number of images per step."""
    steps: int | None = Field(12500, ge=1)
    """Largest number of steps; null: no limit."""
    epochs: float = Field(100, gt=0)
    """Largest number of epochs. It ends the training on a small train set."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Length of the linear warm-up of the learning rate, as a share of the steps."""
    ramp: Literal["open", "from-zero", "closed"] = "open"
    """Learning rate at the ends of warm-up and cosine schedule.

    open: the first rate is one step above 0, and the last rate is one step above the end of the cosine. from-zero: the
    first rate of the warm-up is 0. closed: as from-zero, and the warm-up ends at the peak and the cosine at 0."""
    last_batch: Literal["wrap", "keep", "drop"] = "wrap"
    """Handling of the last batch of an epoch if it is not full.

    wrap: fill it with the first images of the next epoch. keep: train on the smaller batch. drop: skip it."""
    milestones: tuple[Positive, ...] = ()
    """Epochs at which the learning rate is divided by 10. Without any, the rate decays to 0 by a cosine schedule."""
    augment: bool = False
    """Train on random resized crops, half of them flipped. Their features are computed during training, not cached."""
    crop_scale: Shares = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image area."""
    crop_rule: Literal["retry", "clamp"] = "retry"
    """Handling of a random crop that does not fit into the image. retry: draw it again; clamp: cut its sides to
    those of the image."""
    standardize: bool = True
    """Standardize every feature dimension to mean 0 and standard deviation 1 over the train set."""
    selection: Literal["held-out", "test", "test-epochs"] = "held-out"
    """Data on which the best head is chosen. held-out: a part of the train set; test: the test set, at the end;
    test-epochs: the test set, at the best epoch. A choice on the test set makes results too good."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the train set that is held out to choose the head, with selection held-out. No head is trained on it."""

    @property
    def pools(self) -> bool:
        """Whether the heads pool the patches themselves."""
        return self.head != "linear"

    @property
    def heads(self) -> int:
        """Number of heads that are trained."""
        return len(self.blocks) * len(self.norms) * len(self.lrs) * len(self.weight_decays)

    @property
    def flatters(self) -> bool:
        """Whether anything is chosen on the test set, which makes results too good."""
        return self.selection == "test-epochs" or (self.selection == "test" and self.heads > 1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.standardize and not self.pools and set(self.norms) != {"none"}:
            problem = "cannot be combined with `standardize: true`"
            raise UserError(f"norms = {list(self.norms)}", problem, "set `standardize: false`")
        if self.pools and (self.blocks, self.norms, self.optimizer) != ((1,), ("none",), "adamw"):
            problem = "reads the last block without norms, and is trained by AdamW"
            raise UserError(f"head = {self.head}", problem, "remove blocks, norms and optimizer")
        for name in ("clip", "final_weight_decay"):
            if not self.pools and getattr(self, name) is not None:
                raise UserError(f"{name} = {getattr(self, name)}", "a linear head does not use it", f"remove {name}")
        return self


class KnnProtocol(ImageProtocol):
    """k nearest neighbors by cosine similarity s, with votes weighted by exp(s / temperature)."""

    blocks: Count = 1
    """Number of last blocks whose mean patches are concatenated."""
    neighbors: tuple[Count, ...] = Field((10, 20, 100, 200), min_length=1)
    """Values of k for which the accuracy is computed."""
    k: Count = 20
    """The k whose accuracy is the result. It is fixed in advance, because a choice on the test set makes results too
    good."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the vote."""
    standardize: bool = False
    """Standardize every feature dimension to mean 0 and standard deviation 1 over the train set."""

    @model_validator(mode="after")
    def _k_is_scored(self) -> Self:
        if self.k not in self.neighbors:
            raise UserError(f"k = {self.k}", f"is not in `neighbors`, {list(self.neighbors)}", "add it to `neighbors`")
        return self


KINDS: dict[str, type[BaseConfig]] = {
    "linear": LinearProtocol,
    "knn": KnnProtocol,
    "segmentation": SegmentationProtocol,
    "propagation": PropagationProtocol,
}

DEFAULTS = {"linear": "heldout", "knn": "dino", "segmentation": "capi", "propagation": "davis"}
"""The protocol of each kind that is used if none is named."""


def presets(kind: str) -> list[str]:
    """Return the names of the presets of a kind."""
    return preset_names(_folder(kind))


def load_protocol(kind: str, name_or_path: str | Path | None = None) -> Any:
    """Return a protocol of one kind: a preset by its name, a YAML file, or the default of the kind if None.

    Raises:
        UserError: no such preset or file, unknown keys, or values out of range.
    """
    chosen = str(name_or_path or DEFAULTS[kind])
    file = read_yaml(chosen, _folder(kind), f"{kind} protocol")
    values = file.values
    if chosen not in presets(kind):
        if file.base is not None:
            # The name and description of the base would claim that its settings were used.
            changed = ", ".join(key for key in file.own if key not in ("name", "description"))
            description = f"As {file.base}, except for {changed or 'nothing'}."
            values = {**values, "name": Path(chosen).stem, "description": description, **_naming(file.own)}
        _check_name(kind, values.get("name"), chosen)
    return KINDS[kind].read(values, chosen)


def _folder(kind: str) -> str:
    return f"evaluation/protocols/{kind}"


def _naming(own: dict[str, Any]) -> dict[str, Any]:
    return {key: own[key] for key in ("name", "description") if key in own}


def _check_name(kind: str, name: Any, file: str) -> None:
    """Refuse the name of a preset, and a name that cannot be part of a file name."""
    if not isinstance(name, str):
        return  # refused by the type of the field
    where, hint = f"{file}: name = {name!r}", "give a different name; results are stored and compared by name"
    if name in presets(kind):
        raise UserError(where, f"is the name of a {kind} preset", hint)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(where, "cannot be part of a file name", hint)
