"""Protocols of segmentation by frozen features: all settings that determine a result, typed."""

from typing import Annotated, Literal

from pydantic import Field

from ijepa.data.loading.crop import Interpolation
from ijepa.evaluation.features.precision import Autocast
from ijepa.evaluation.segmentation.retrieval import Distance
from ijepa.utils.config import BaseConfig

PATCHES = 4_000_000
"""Default of the largest number of patches in memory: that of ADE20K's 20,210 training images at 14 x 14."""


class Clustering(BaseConfig):
    """Level 0: clusters of patch features, matched to classes."""

    components: int = Field(50, ge=1)
    """Number of principal components of the standardized features to keep."""
    overcluster: int = Field(500, ge=1)
    """Number of clusters for many-to-one matching."""
    iterations: int = Field(100, ge=1)
    """Largest number of Lloyd iterations."""
    restarts: int = Field(5, ge=1)
    """Number of restarts of k-means. The one with the smallest inertia is used."""
    seeds: int = Field(5, ge=1)
    """Number of runs with different seeds. The result is their mean."""
    mask_size: int = Field(100, ge=1)
    """Side length in pixels to which clusters and masks are resized, by nearest neighbor, to compare them."""
    patches: int = Field(PATCHES, ge=1)
    """Largest number of patches in memory. If the test set has more, images are selected by the seed, and the result
    states their number."""


class Searched(BaseConfig):
    """How a patch bank is searched."""

    search: Literal["exact", "faiss"] = "exact"
    """Search method. exact: search the whole bank; faiss: search some lists of an inverted file index (IndexIVFFlat),
    which needs the extra `faiss`. The result states the recall."""
    lists: int | None = Field(None, ge=1)
    """Number of lists of the index; null: about the square root of the number of patches in the bank."""
    probes: int = Field(32, ge=1)
    """Number of lists that are searched per query."""


class Retrieval(Searched):
    """Level 1: nearest neighbors in a bank of labeled patches."""

    neighbors: tuple[Annotated[int, Field(ge=1, le=255)], ...] = Field((1, 3, 10, 30), min_length=1)
    """Values of k to choose from."""
    distances: tuple[Distance, ...] = Field(("cosine", "l2"), min_length=1)
    """Distances to choose from."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the training images that is held out to choose k and distance."""
    bank_patches: int | None = Field(PATCHES, ge=1)
    """Largest number of patches in the bank, which limits its memory. The same number is taken from every image. null:
    all patches."""


class SoftRetrieval(Searched):
    """Level 1: nearest neighbors with soft labels, as in Hummingbird."""

    neighbors: int = Field(30, ge=1)
    """Number of nearest neighbors (k)."""
    temperature: float = Field(0.02, gt=0)
    """Temperature T of the weights of the neighbors, softmax(cosine / T)."""
    bank_patches: int | None = Field(10_240_000, ge=1)
    """Largest number of patches in the bank, which limits its memory. The same number is taken from every image, rare
    classes first. null: all patches."""


class LinearHead(BaseConfig):
    """Level 2: a linear layer on patch features, trained on masks."""

    lr: float = Field(1e-3, gt=0)
    """Peak learning rate of AdamW. It decays to 0 by a cosine schedule."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay of AdamW."""
    steps: int = Field(40_000, ge=1)
    """Number of training steps."""
    batch: int = Field(16, ge=1)
    """Number of images per step."""
    warmup: float = Field(0.0375, ge=0, lt=1)
    """Length of the linear warm-up of the learning rate, as a share of the steps."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Probability that a channel of an image is dropped in training."""


class TokenCut(BaseConfig):
    """Level 0: one object per image, segmented by the similarity of the patches."""

    tau: float = Field(0.2, ge=-1, lt=1)
    """Cosine similarity above which two patches are connected."""
    eps: float = Field(1e-5, gt=0)
    """Edge weight between patches that are not connected."""
    ground: tuple[str, ...] = ("ground", "background")
    """Names of the background classes. If classes have no names, class 0 is the background."""


class SegmentationProtocol(BaseConfig):
    """One protocol of segmentation by frozen features."""

    name: str
    """Name of the protocol in results."""
    description: str = ""
    """Description: the published protocol that it follows, and the differences."""
    method: Literal["kmeans", "tokencut", "retrieval", "hummingbird", "linear"]
    """Method of segmentation. Only the section with its name is used."""
    image_size: int = Field(ge=1)
    """Side length in pixels to which whole images are resized."""
    interpolation: Interpolation = "bilinear"
    """Antialiased filter that resizes the images: bilinear or bicubic."""
    classes: int | None = Field(None, ge=2)
    """Number of mask labels, including 0; null: the named classes of the data set and the background, or else the
    highest label in the masks."""
    ignore: tuple[int, ...] = (255,)
    """Mask labels that are not scored. A label map has its own list."""
    labels: str | None = None
    """Label map of the masks: the name of a preset or a YAML file; null: that of the data set."""
    train_images: int | None = Field(None, ge=2)
    """Largest number of training images, selected by the seed; null: all."""
    test_images: int | None = Field(None, ge=1)
    """Largest number of test images, selected by the seed; null: all."""
    batch: int = Field(32, ge=1)
    """Number of images per forward pass of the encoder."""
    autocast: Autocast = "auto"
    """Precision of the encoder: none (float32), bf16, or auto (bf16 on a GPU, float32 on a CPU)."""
    kmeans: Clustering = Clustering()
    tokencut: TokenCut = TokenCut()
    retrieval: Retrieval = Retrieval()
    hummingbird: SoftRetrieval = SoftRetrieval()
    linear: LinearHead = LinearHead()

    @property
    def level(self) -> int:
        """Use of labels. 0: only for scoring; 1: in a bank that is searched; 2: to train a layer."""
        return {"kmeans": 0, "tokencut": 0, "linear": 2}.get(self.method, 1)

    @property
    def unused(self) -> set[str]:
        """The sections of other methods."""
        return {"kmeans", "tokencut", "retrieval", "hummingbird", "linear"} - {self.method}
