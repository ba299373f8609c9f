"""Protocols: every number that decides a result, typed, in YAML beside the code, and printed into every result.

`load_protocol` reads those of all kinds: a name of a preset in `protocols/KIND/`, or a YAML file of one's own. A
file may build on a preset with `base: NAME`.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from ijepa.data.loading.crop import Interpolation
from ijepa.evaluation.classification.linear_heads import Norm
from ijepa.evaluation.classification.optimizers import Name
from ijepa.evaluation.features.precision import Autocast
from ijepa.evaluation.segmentation.protocol import SegmentationProtocol
from ijepa.evaluation.video.protocol import PropagationProtocol
from ijepa.utils.config import Section, Shares
from ijepa.utils.errors import Refused, did_you_mean

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class ImageProtocol(Section):
    """What protocols that classify whole images share."""

    name: str
    """What results call it."""
    description: str = ""
    """What it follows, and where it departs from that."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels that images are brought to; the encoder's native size if null."""
    crop_fraction: float = Field(0.875, gt=0, le=1)
    """Share of the short side that the central crop keeps; 0.875 is "resize to 256, crop 224"."""
    interpolation: Interpolation = "bilinear"
    """How images are brought to their size, train and test alike, antialiased: bilinear or bicubic."""
    train_images: int | None = Field(None, ge=2)
    """Train images used at most, chosen by seed; all if null."""
    test_images: int | None = Field(None, ge=1)
    """Test images used at most, chosen by seed; all if null."""
    forward_batch: int = Field(64, ge=1)
    """Images a forward pass."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto, which is bf16 on a GPU and float32 on a CPU."""


class LinearProtocol(ImageProtocol):
    """A linear or attentive probe: many heads on frozen features, trained in one pass, one of them chosen."""

    head: Literal["linear", "attentive", "query"] = "linear"
    """linear reads means of patches; query pools the last block's by a learned query, attentive by that and a block."""
    attention_heads: int | None = Field(None, ge=1)
    """Of pooling heads; if null, attentive has as many as the encoder, and query one for every 64 channels."""
    clip: float | None = Field(None, gt=0)
    """Length to which a pooling head's gradient is cut; no bound if null."""
    final_weight_decay: float | None = Field(None, ge=0)
    """What a pooling head's decay falls to by a cosine; it stays if null."""
    blocks: tuple[Count, ...] = Field((1, 4), min_length=1)
    """How many last blocks are concatenated, each the mean of its patches; one group of heads for each number."""
    norms: tuple[Norm, ...] = Field(("none",), min_length=1)
    """What stands before the linear layer: none, batch (a batch norm without gain and offset), batch-affine."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the batch norm."""
    norm_batch: int | None = Field(None, ge=2)
    """Images that a batch norm takes its figures from: those of one device or machine; the whole step's if null."""
    lrs: tuple[Positive, ...] = Field(min_length=1)
    """Peak learning rates per 256 images a step, one head for each with each weight decay and each norm."""
    weight_decays: tuple[NotNegative, ...] = Field(min_length=1)
    """Weight decays, decoupled in AdamW; norms have none."""
    decay_bias: bool = False
    """Decay biases of linear heads, too."""
    optimizer: Name = "adamw"
    """adamw, sgd or lars."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its moment estimates."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of sgd and lars."""
    initial_std: NotNegative | Literal["linear"] = 0.0
    """Deviation of a linear head's weights at the start, biases at 0; 0 is zero, which a convex problem allows.

    linear is the start of torch's nn.Linear: weights and biases uniform within 1 / sqrt(features)."""
    batch: int = Field(1024, ge=1)
    """Images a step."""
    steps: int | None = Field(12500, ge=1)
    """Steps at most; no bound if null."""
    epochs: float = Field(100, gt=0)
    """Passes over the train set at most: a small set ends here."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly."""
    ramp: Literal["open", "from-zero", "closed"] = "open"
    """How warm-up and cosine begin and end.

    open: the first rate is one step above 0, the last one step above the cosine's end. from-zero: the first rate of the
    warm-up is 0. closed: that, and the last rates of warm-up and cosine are the peak and 0."""
    last_batch: Literal["wrap", "keep", "drop"] = "wrap"
    """The end of an epoch whose images the batch does not divide.

    wrap fills the batch with the next epoch's first images, keep trains on a smaller one, drop leaves the rest out."""
    milestones: tuple[Positive, ...] = ()
    """Epochs at which the rate is divided by 10; if none, it falls to 0 by a cosine."""
    augment: bool = False
    """Train on random resized crops, flipped half of the time, their features made as heads train, not cached."""
    crop_scale: Shares = (0.08, 1.0)
    """Bounds of a crop's share of the image's area."""
    crop_rule: Literal["retry", "clamp"] = "retry"
    """What happens to a random crop that does not fit: retry draws it again, clamp cuts its sides to the image's."""
    standardise: bool = True
    """Bring every dimension to mean 0 and deviation 1 over the train set."""
    selection: Literal["held-out", "test", "test-epochs"] = "held-out"
    """Where the head is chosen: held-out is honest; test (at the end) and test-epochs (best epoch) flatter."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the train set that no head is trained on and that chooses the head, where the selection is held-out."""

    @property
    def pools(self) -> bool:
        """Whether heads pool patches themselves."""
        return self.head != "linear"

    @property
    def heads(self) -> int:
        """How many heads are trained."""
        return len(self.blocks) * len(self.norms) * len(self.lrs) * len(self.weight_decays)

    @property
    def flatters(self) -> bool:
        """Whether anything is chosen on the test set."""
        return self.selection == "test-epochs" or (self.selection == "test" and self.heads > 1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.standardise and not self.pools and set(self.norms) != {"none"}:
            raise Refused("standardise = true", f"and norms = {list(self.norms)}", "set standardise: false")
        if self.pools and (self.blocks, self.norms, self.optimizer) != ((1,), ("none",), "adamw"):
            raise Refused(f"head = {self.head}", "reads the last block by AdamW", "drop blocks, norms and optimizer")
        for name in ("clip", "final_weight_decay"):
            if not self.pools and getattr(self, name) is not None:
                raise Refused(f"{name} = {getattr(self, name)}", "and head = linear, which has none", f"drop {name}")
        return self


class KnnProtocol(ImageProtocol):
    """k nearest neighbours by cosine similarity, votes weighted by exp(s / temperature)."""

    blocks: Count = 1
    """How many last blocks are concatenated, each the mean of its patches."""
    neighbours: tuple[Count, ...] = Field((10, 20, 100, 200), min_length=1)
    """Values of k that are scored."""
    k: Count = 20
    """The k whose accuracy is the result: fixed beforehand, since choosing it on the test set would flatter."""
    temperature: float = Field(0.07, gt=0)
    """T of the vote."""
    standardise: bool = False
    """First bring every dimension to mean 0 and deviation 1 over the train set."""

    @model_validator(mode="after")
    def _k_is_scored(self) -> Self:
        if self.k not in self.neighbours:
            raise Refused(f"k = {self.k}", f"is not one of neighbours = {list(self.neighbours)}", "add it there")
        return self


KINDS: dict[str, type[Section]] = {
    "linear": LinearProtocol,
    "knn": KnnProtocol,
    "segmentation": SegmentationProtocol,
    "propagation": PropagationProtocol,
}

DEFAULTS = {"linear": "heldout", "knn": "dino", "segmentation": "capi", "propagation": "davis"}
"""The protocol of each kind that is meant when none is named."""


def presets(kind: str) -> list[str]:
    """Return the names of a kind's presets."""
    folder = resources.files("ijepa.evaluation") / "protocols" / kind
    return sorted(Path(file.name).stem for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_protocol(kind: str, name_or_path: str | Path | None = None) -> Any:
    """Return a protocol of one kind: a preset by its name, a YAML file, or the kind's default if None.

    Raises:
        Refused: no such preset or file, unknown keys, or values out of range.
    """
    chosen = str(name_or_path or DEFAULTS[kind])
    return KINDS[kind].read(_values(kind, chosen), chosen)


def _values(kind: str, chosen: str) -> dict[str, Any]:
    if chosen in presets(kind):
        file: Any = resources.files("ijepa.evaluation") / "protocols" / kind / f"{chosen}.yaml"
    elif Path(chosen).suffix in (".yaml", ".yml"):
        file = Path(chosen)
    else:
        raise Refused("--protocol", f"no {kind} protocol {chosen!r}", did_you_mean(chosen, presets(kind)))
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(chosen, f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refused(chosen, f"is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise Refused(chosen, "holds no keys and values", "see the presets in evaluation/protocols")
    base = values.pop("base", None)
    if base is not None:
        values = _over(kind, chosen, base, values)
    name = values.get("name")
    if isinstance(name, str) and chosen not in presets(kind):
        where, mend = f"{chosen}: name = {name!r}", "give it another: results are filed and compared by name"
        if name in presets(kind):
            raise Refused(where, f"is the name of a {kind} preset", mend)
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise Refused(where, "cannot be part of a file's name", mend)
    return values


def _over(kind: str, chosen: str, base: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Return a file's values over those of the preset `base`, section by section, under a name of their own."""
    if base not in presets(kind):
        raise Refused(
            f"{chosen}: base = {base!r}", f"no {kind} protocol of that name", did_you_mean(str(base), presets(kind))
        )
    below = _values(kind, base)
    changed = ", ".join(key for key in values if key not in ("name", "description"))
    both = {
        key: {**below[key], **value} if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in values.items()
    }
    return {**below, "name": Path(chosen).stem, "description": f"As {base}, but for {changed or 'nothing'}.", **both}
