"""The recipe: every number of a run, typed and validated, in one frozen object.

The values of a YAML file replace the defaults below, and dotted overrides such as `optimizer.lr_encoder` replace the
values of the file. `base: NAME` in a file starts from another recipe. The presets are in `recipes/`. The sections of
the model and of the masks are the plain classes of `ijepa.model` and `ijepa.masking` with checked values. A value that
is not allowed ends in one line, before anything is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from ijepa.config.files import RECIPES, read_yaml, set_by_path
from ijepa.masking.masks import MaskRule
from ijepa.model.config import EncoderConfig, InitScheme, ModelConfig, PredictorConfig
from ijepa.utils import random as randomness
from ijepa.utils.config import BaseConfig, Decays, Ratios, Shares
from ijepa.utils.errors import UserError
from ijepa.utils.quantities import Duration, Size

Auto = Literal["auto"]


class EncoderSection(BaseConfig, EncoderConfig):
    """The context encoder and its exponential moving average, the target encoder."""

    width: int = Field(1280, ge=8)
    """Embedding dimension of the encoders; must be a multiple of 4 and of the number of heads."""
    depth: int = Field(32, ge=1)
    """Number of transformer blocks in the encoders."""
    heads: int = Field(16, ge=1)
    """Number of attention heads in the encoders; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Ratio of the hidden width of the MLP to the width of the encoders."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth rate of the last block of the context encoder; it rises linearly from 0 at the first block."""
    position_scale: float = Field(1.0, ge=0)
    """Factor on the sin-cos position embeddings of the encoders; 1 in the paper."""
    initial: InitScheme = "normal"
    """Standard deviation of the initial weights. normal: 0.02; xavier: sqrt(2 / (fan_in + fan_out)), which narrow
    encoders need."""


class PredictorSection(BaseConfig, PredictorConfig):
    """The predictor: narrower than the encoders."""

    width: int = Field(384, ge=8)
    """Embedding dimension of the predictor; must be a multiple of 4 and of the number of heads."""
    depth: int = Field(12, ge=1)
    """Number of transformer blocks in the predictor."""
    heads: int = Field(16, ge=1)
    """Number of attention heads in the predictor; must divide the width."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Ratio of the hidden width of the MLP to the width of the predictor."""
    position_scale: float = Field(1.0, ge=0)
    """Factor on the sin-cos position embeddings of the predictor; 1 in the paper."""
    initial: InitScheme = "normal"
    """Standard deviation of the initial weights; the same choices as for the encoders."""


class ModelSection(BaseConfig, ModelConfig):
    """The shape of the model."""

    image_size: Size = (224, 224)
    """Height and width of the training crops in pixels; one number for square crops."""
    patch_size: int = Field(16, ge=1)
    """Side length of a patch in pixels."""
    position_grid: Size | None = None
    """Rows and columns of the grid that position embeddings were made for; they are interpolated from it. none: the
    grid of model.image_size. init.from sets it if the weights come from a different resolution."""
    encoder: EncoderSection = EncoderSection()
    predictor: PredictorSection = PredictorSection()

    @model_validator(mode="after")
    def _divides(self) -> Self:
        for side in self.image_size:
            if side < 1 or side % self.patch_size:
                fit = max(side // self.patch_size, 1) * self.patch_size
                problem = f"patch_size {self.patch_size} does not divide it"
                raise UserError(f"model.image_size = {side}", problem, f"try {fit}")
        if self.position_grid is not None and min(self.position_grid) < 1:
            raise UserError(f"model.position_grid = {list(self.position_grid)}", "must be 1 or more", "or use none")
        for name, part in (("encoder", self.encoder), ("predictor", self.predictor)):
            if part.width % part.heads:
                raise UserError(f"model.{name}.heads = {part.heads}", f"does not divide the width {part.width}")
            if part.width % 4:
                where = f"model.{name}.width = {part.width}"
                raise UserError(where, "is not a multiple of 4", "sin-cos position embeddings need a multiple of 4")
        return self


class MaskSection(BaseConfig, MaskRule):
    """How context and target blocks are drawn. Areas are shares of the image, aspect ratios are height over width."""

    targets: int = Field(4, ge=1, le=16)
    """Number of target blocks per image."""
    target_scale: Shares = (0.15, 0.2)
    """Area of a target block, as a share of the image area."""
    target_aspect: Ratios = (0.75, 1.5)
    """Aspect ratio of a target block, height over width."""
    context_scale: Shares = (0.85, 1.0)
    """Area of the context block before target patches are removed, as a share of the image area."""
    context_aspect: Ratios = (1.0, 1.0)
    """Aspect ratio of the context block, height over width."""
    min_context: int = Field(10, ge=1)
    """Minimum number of context patches per image."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Check that the masks can be drawn on a grid of (rows, columns) patches.

        Raises:
            UserError: no target block of whole patches has about the right area and aspect ratio, or one target block
                could leave fewer than `min_context` patches of context.
        """
        size = f"{grid[0]}x{grid[1]} grid"
        if not self.has_target_block(grid):
            where = f"mask.target_scale = {self.target_scale[0]},{self.target_scale[1]}"
            problem = f"no block of whole patches has that area and aspect on a {size}"
            raise UserError(where, problem, "use a smaller patch_size or a larger image_size")
        context, target = self.smallest_context(grid), self.largest_target(grid)
        if context - target < self.min_context:
            problem = f"on a {size}, one target block can remove {target} of the {context} patches of a context block"
            hint = f"the largest possible value is {max(context - target, 0)}"
            raise UserError(f"mask.min_context = {self.min_context}", problem, hint)


class DataSection(BaseConfig):
    """Where images come from and how they are cropped."""

    path: str | None = None
    """Training images: a folder of class folders, a flat folder, tar shards (a folder, a brace pattern or a glob), or
    one tar file."""
    workers: Annotated[int, Field(ge=0)] | Auto = "auto"
    """Number of data loader processes. auto: the cores that training does not use; 0: load in the training process."""
    prefetch: int = Field(2, ge=1)
    """Number of micro-batches that each worker prepares in advance."""
    images: int | None = Field(None, ge=1)
    """Number of images in the data set, to plan a run without the data; a run counts its images itself."""
    order: Literal["global", "blocks"] = "global"
    """How images are shuffled. global: one shuffle of all images; blocks: in blocks of adjacent images, for disks and
    networks with slow seeks."""
    block: int = Field(256, ge=1)
    """Number of adjacent images in a block, if data.order is blocks."""
    window: int = Field(64, ge=1)
    """Number of blocks whose images are mixed, if data.order is blocks."""
    crops_per_decode: int = Field(1, ge=1)
    """Number of crops per decoded image, at adjacent places in a batch; more than 1 helps if decoding is the
    bottleneck."""
    crop_scale: Shares = (0.3, 1.0)
    """Area of a random crop, as a share of the image area."""
    crop_ratio: Ratios = (3 / 4, 4 / 3)
    """Aspect ratio of a random crop, width over height."""
    replaced_limit: float = Field(0.01, ge=0, le=1)
    """Largest allowed share of unreadable images. The run stops when it is certain, or almost certain, that the share
    is larger."""


class BatchSection(BaseConfig):
    """Number of images in an optimizer step."""

    total: int = Field(2048, ge=1, alias="global")
    """Number of images per optimizer step, over all ranks and micro-batches (the global batch)."""
    micro: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Number of images in one forward and backward pass; gradients are accumulated over the global batch. auto: as many
    as fit in memory."""
    pad_to_budget: bool | Auto = "auto"
    """Pad micro-batches to a constant number of tokens, so that tensor shapes are constant; auto: on a GPU only."""


class OptimizerSection(BaseConfig):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), with one learning rate for each part."""

    lr_encoder: float = Field(6e-4, gt=0)
    """Peak learning rate of the context encoder."""
    lr_predictor: float = Field(1.5e-3, gt=0)
    """Peak learning rate of the predictor."""
    betas: Decays = (0.9, 0.95)
    """Decay rates of the two moment estimates of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Epsilon in the denominator of AdamW."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay at the start; biases, norms and the mask token have no decay."""
    weight_decay_end: float | None = Field(None, ge=0)
    """Weight decay at the end of a cosine schedule; none: weight decay stays constant."""
    clip_norm: float | None = Field(None, gt=0)
    """Maximum norm of the whole gradient; larger gradients are scaled down to it. none: no clipping."""
    nonfinite_limit: int = Field(10, ge=0)
    """Largest allowed number of consecutive void steps, whose gradient is not finite and which change nothing. The run
    stops after more."""


class ScheduleSection(BaseConfig):
    """Schedules of the learning rates and of the EMA momentum."""

    warmup: Duration = Duration(amount=40, unit="epochs")
    """Length of the linear warm-up: `40 epochs`, `1000 steps`, `1e6 images` or `5 %`."""
    warmup_from: float = Field(0.0, ge=0, le=1)
    """Learning rate at the start of the warm-up, as a share of the peak."""
    decay: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up. cosine: cosine decay; wsd: constant, then linear decay over schedule.cooldown
    (warmup-stable-decay)."""
    cooldown: Duration = Duration(amount=20, unit="%")
    """Length of the linear decay at the end, if schedule.decay is wsd."""
    lr_end: float = Field(1e-6, ge=0)
    """Learning rate at the end, for encoder and predictor."""
    momentum_start: float = Field(0.996, ge=0, le=1)
    """EMA momentum of the target encoder at the start; it changes linearly to schedule.momentum_end."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """EMA momentum of the target encoder at the end."""


class PrecisionSection(BaseConfig):
    """Precision of the computation; parameters, EMA and optimizer state are always float32."""

    autocast: Literal["auto", "none", "bf16"] = "auto"
    """Precision of matrix products. none: float32 without TF32; auto: the faster one on this machine, measured once and
    recorded."""
    fp8: Literal["none", "tensorwise", "rowwise"] = "none"
    """Linear layers of both encoders in float8, with one scale per tensor or per row."""
    fp8_weight_gradient: Literal["fp8", "bf16"] = "fp8"
    """Precision in which float8 layers compute the gradient of their weights."""
    attention: Literal["auto", "flash", "cudnn", "efficient", "math"] = "auto"
    """Attention kernel. auto: FlashAttention-2 on a GPU with bf16, otherwise batched matrix products."""


class ParallelSection(BaseConfig):
    """Distribution of a run over devices."""

    strategy: Literal["auto", "none", "ddp", "zero2", "zero3", "hsdp"] = "auto"
    """What is sharded over the ranks. ddp: nothing; zero2: optimizer state, gradients and target encoder; zero3: all
    weights as well; hsdp: as zero2 within groups of ranks, and the groups are replicas; auto: zero2 under torchrun,
    otherwise none (a single process)."""
    shard: Annotated[int, Field(ge=1)] | Auto = "auto"
    """Number of ranks in a group of hsdp, which holds one replica; auto: the ranks of one node."""
    timeout: float = Field(600.0, gt=0)
    """Seconds without progress after which the run fails and names the rank that the others wait for. Measuring and
    compiling do not count."""


class CheckpointSection(BaseConfig):
    """When the state of the run is saved."""

    every: int = Field(1000, ge=1)
    """Number of steps between checkpoints; the last step is saved as well."""
    keep: int = Field(2, ge=1)
    """Number of latest checkpoints to keep."""


class InitSection(BaseConfig):
    """Pretrained weights to start from, instead of random ones."""

    source: str | None = Field(None, alias="from")
    """Weights to start from: a run, a weights folder, or weights of another library; none: random weights."""
    parts: Literal["encoder", "all"] = "encoder"
    """Parts of the weights to load. encoder: both encoders start from the target encoder, with a random predictor;
    all: both encoders and the predictor."""


class Recipe(BaseConfig):
    """All settings of a run."""

    name: str = "unnamed"
    """Name of the recipe, and of the default run folder."""
    description: str = ""
    """Description of the recipe."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of all random draws."""
    randomness: int = randomness.VERSION
    """Version of the random number generation; a recipe of a different version is an error."""
    epochs: float | None = Field(None, gt=0)
    """Length of the run in epochs (passes over the data)."""
    images: int | None = Field(None, ge=1)
    """Length of the run in images; overrides epochs."""
    steps: int | None = Field(None, ge=1)
    """Length of the run in steps; overrides epochs and images."""
    model: ModelSection = ModelSection()
    init: InitSection = InitSection()
    mask: MaskSection = MaskSection()
    data: DataSection = DataSection()
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    precision: PrecisionSection = PrecisionSection()
    parallel: ParallelSection = ParallelSection()
    compile: bool | Auto = False
    """Compile each transformer block with torch.compile; auto: on a GPU only."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of storing. none: none of them; selective: all but the
    outputs of matrix products and attention; full: all of them."""
    checkpoint: CheckpointSection = CheckpointSection()
    log_every: int = Field(10, ge=1)
    """Number of steps between reads of metrics from the device; metrics are recorded for every step."""
    deterministic: bool = True
    """Use deterministic kernels, so that results are bitwise repeatable; slower on CUDA."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.randomness != randomness.VERSION:
            problem = f"this version of ijepa has randomness {randomness.VERSION}"
            hint = "use the version that wrote the recipe, or remove the key to draw different numbers"
            raise UserError(f"randomness = {self.randomness}", problem, hint)
        if self.steps is None and self.images is None and self.epochs is None:
            raise UserError("epochs", "the run has no length", "set epochs, images or steps")
        self.mask.check_grid(self.model.grid)
        whole, micro, crops = self.batch.total, self.batch.micro, self.data.crops_per_decode
        for key, divisor in (("batch.micro", micro), ("data.crops_per_decode", crops)):
            if divisor != "auto" and whole % divisor:
                raise UserError(f"{key} = {divisor}", f"does not divide batch.global = {whole}", "choose a divisor")
        if self.data.images is not None:
            self.lengths(self.data.images)
        elif self.steps is not None and self.schedule.warmup.unit in ("steps", "%"):
            self.lengths(1)
        return self

    def lengths(self, images: int) -> "Lengths":
        """Return the lengths of the run, its warm-up and its cooldown in steps, for a data set of `images` images.

        Raises:
            UserError: warm-up and cooldown are not shorter than the run.
        """
        whole = self.batch.total
        if self.steps is not None:
            total = self.steps
        elif self.images is not None:
            total = max(self.images // whole, 1)
        else:
            total = max(round((self.epochs or 0) * images / whole), 1)
        warmup = self.schedule.warmup.steps(images=images, global_batch=whole, total=total)
        cooldown = 0
        if self.schedule.decay == "wsd":
            cooldown = self.schedule.cooldown.steps(images=images, global_batch=whole, total=total)
        if warmup + cooldown >= total and warmup + cooldown > 0:
            both = f"{warmup} steps of warm-up" + (f" and {cooldown} of cooldown" if cooldown else "")
            hint = "shorten the warm-up, for example --schedule.warmup '5 %'"
            raise UserError(
                f"schedule.warmup = {self.schedule.warmup}", f"{both} do not fit in a run of {total} steps", hint
            )
        return Lengths(total=total, warmup=warmup, cooldown=cooldown)

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Load a preset or a YAML file, replace the values of dotted `overrides`, and validate the result.

        Raises:
            UserError: no such file, or a value that is not allowed.
        """
        file = read_yaml(name_or_path, RECIPES, "recipe")
        for key, value in (overrides or {}).items():
            set_by_path(file.values, key.split("."), value)
        return cls.read(file.values, file.where)

    def dump(self) -> str:
        """Return the recipe with all its values as YAML; loading it gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


@dataclass(frozen=True)
class Lengths:
    """Lengths of the parts of a run in steps."""

    total: int
    warmup: int
    cooldown: int  # of the linear decay at the end; 0 with a cosine
