"""Protocols of segmentation by frozen features: every number that decides a result, typed, in YAML beside the code."""

from typing import Annotated, Literal

from pydantic import Field

from ijepa.data.loading.crop import Interpolation
from ijepa.evaluation.features.precision import Autocast
from ijepa.evaluation.segmentation.retrieval import Distance
from ijepa.utils.config import Section

PATCHES = 4_000_000
"""Patches that are held at most where nothing else is said: those of ADE20K's 20,210 training images at 14 x 14."""


class Clustering(Section):
    """Level 0: clusters of patch features, matched to classes."""

    components: int = Field(50, ge=1)
    """Principal components kept of the standardised features."""
    overcluster: int = Field(500, ge=1)
    """Clusters of the many-to-one reading."""
    iterations: int = Field(100, ge=1)
    """Lloyd iterations at most."""
    restarts: int = Field(5, ge=1)
    """Starts of k-means, of which the one with the least inertia is kept."""
    seeds: int = Field(5, ge=1)
    """Runs whose mean is the result."""
    mask_size: int = Field(100, ge=1)
    """Side in pixels at which clusters and masks are compared, both by nearest neighbour."""
    patches: int = Field(PATCHES, ge=1)
    """Patches held at most; of a larger test set images are chosen by seed, and the result has their number."""


class Searched(Section):
    """How a bank is searched."""

    search: Literal["exact", "inverted"] = "exact"
    """exact looks at the whole bank; inverted at a few of its lists, and the result states the recall."""
    lists: int | None = Field(None, ge=1)
    """Lists of the inverted index; about the square root of the bank's patches if null."""
    probes: int = Field(32, ge=1)
    """Lists that a query looks through."""


class Retrieval(Searched):
    """Level 1: nearest neighbours in a bank of labelled patches."""

    neighbours: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field((1, 3, 10, 30), min_length=1)
    """Values of k to choose from."""
    distances: tuple[Distance, ...] = Field(("cosine", "l2"), min_length=1)
    """Distances to choose from."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the training images on which k and distance are chosen."""
    bank_patches: int | None = Field(PATCHES, ge=1)
    """Patches in the bank at most, the same number of every image; all if null. Bounds the memory."""


class SoftRetrieval(Searched):
    """Level 1: nearest neighbours with soft labels, as in Hummingbird."""

    neighbours: int = Field(30, ge=1)
    """k."""
    temperature: float = Field(0.02, gt=0)
    """T of the neighbours' weights, softmax(cosine / T)."""
    bank_patches: int | None = Field(10_240_000, ge=1)
    """Patches in the bank at most, as many of every image, rare classes first; all if null. Bounds the memory."""


class LinearHead(Section):
    """Level 2: a linear layer on patch features, trained on masks."""

    lr: float = Field(1e-3, gt=0)
    """AdamW's rate at its peak; after it falls to 0 by a cosine."""
    weight_decay: float = Field(1e-3, ge=0)
    """AdamW's decay."""
    steps: int = Field(40_000, ge=1)
    """Steps of training."""
    batch: int = Field(16, ge=1)
    """Images a step."""
    warmup: float = Field(0.0375, ge=0, lt=1)
    """Share of the steps in which the rate rises linearly."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """How often a channel of an image is left out in training."""


class TokenCut(Section):
    """Level 0: one object an image, cut out by the similarity of its patches."""

    tau: float = Field(0.2, ge=-1, lt=1)
    """Cosine above which two patches are joined."""
    eps: float = Field(1e-5, gt=0)
    """Weight between patches that are not."""
    ground: tuple[str, ...] = ("ground", "background")
    """Names of the classes that are no objects; where classes have no names, 0 is ground."""


class SegmentationProtocol(Section):
    """One protocol of segmentation by frozen features."""

    name: str
    """What results call it."""
    description: str = ""
    """One line."""
    method: Literal["kmeans", "tokencut", "retrieval", "hummingbird", "linear"]
    """Which of the five; only the section of that name counts."""
    image_size: int = Field(ge=1)
    """Side in pixels to which whole images are resized."""
    interpolation: Interpolation = "bilinear"
    """How they are, antialiased: bilinear or bicubic."""
    classes: int | None = Field(None, ge=2)
    """Number of mask labels, 0 included; if null, the set's named classes and ground, or the masks' highest label."""
    ignore: tuple[int, ...] = (255,)
    """Labels that are not scored; a label map says so itself."""
    labels: str | None = None
    """Label map of the masks, a preset's name or a YAML file; the data set's own if null."""
    train_images: int | None = Field(None, ge=2)
    """Training images used at most, chosen by seed; all if null."""
    test_images: int | None = Field(None, ge=1)
    """Test images used at most, chosen by seed; all if null."""
    batch: int = Field(32, ge=1)
    """Images a forward pass."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto, which is bf16 on a GPU and float32 on a CPU."""
    kmeans: Clustering = Clustering()
    tokencut: TokenCut = TokenCut()
    retrieval: Retrieval = Retrieval()
    hummingbird: SoftRetrieval = SoftRetrieval()
    linear: LinearHead = LinearHead()

    @property
    def level(self) -> int:
        """What a result consumes: 0 labels only score, 1 a labelled support set, nothing trained, 2 a trained layer."""
        return {"kmeans": 0, "tokencut": 0, "linear": 2}.get(self.method, 1)

    @property
    def others(self) -> set[str]:
        """The sections that do not count."""
        return {"kmeans", "tokencut", "retrieval", "hummingbird", "linear"} - {self.method}
