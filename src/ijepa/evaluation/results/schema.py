"""The typed result of an evaluation, and its JSON form.

A JSON object holds only the fields that were set, so that a result that is read from a file and written again is the
same. Unknown keys are kept, because files of earlier and later versions have others.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ijepa.utils.errors import UserError

KIND_NAMES = {
    "linear": "Linear probe",
    "knn": "kNN",
    "segmentation": "Segmentation",
    "propagation": "Label propagation",
    "diagnosis": "Diagnosis",
}
"""Kinds of results with their names in titles, in the order in which reports show them."""

HEADLINE = {"linear": "top1", "knn": "top1", "segmentation": "miou", "propagation": "jf"}
"""The main metric of each kind: the one that summaries show, and whose interval is `ci`."""

METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "held_out": "top-1, held out",
    "miou": "mIoU",
    "miou_absent_zero": "mIoU, absent = 0",
    "miou_overclustered": "mIoU, overclustered",
    "miou_held_out": "mIoU, held out",
    "pixel_accuracy": "pixel accuracy",
    "corloc": "CorLoc",
    "jf": "J&F",
    "j": "J",
    "f": "F",
    "j_recall": "J, recall",
    "f_recall": "F, recall",
    "iou_images": "foreground IoU, mean of images",
}
"""Metrics of rows, all between 0 and 1, with their names in tables."""

_NOT_SETTINGS = ("ci", "corloc_ci", "iou_images_ci", "per_class", "seeds")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class DataSet(_Part):
    """A set of images or videos that a result was computed from."""

    n: int | None = None
    """Number of images or videos."""
    classes: int | None = None
    """Number of classes that occur; only in results of image classification."""
    fingerprint: str | None = None
    path: str | None = None
    list: str | None = None
    """File of image names that selected a part of the set."""


class Data(_Part):
    """The sets of a result and their classes."""

    train: DataSet = DataSet()
    test: DataSet = DataSet()
    classes: tuple[str, ...] | None = None
    """Names of the classes by number; None if they have none."""
    labels: dict[str, str] = {}
    """Name of the label map of each set."""
    labels_sha256: dict[str, str] = {}
    """Hash of the classes of each label map."""

    def of(self, role: str) -> DataSet:
        """Return the set of a role, train or test; an empty one if the result has none."""
        return self.train if role == "train" else self.test


class ResultRow(_Part):
    """The metrics of one encoder. Metrics and settings depend on the method: `row["miou"]`, `row.get("k")`."""

    encoder: str
    """Name of the encoder: trained, random, pixels, or as the user named it."""

    def __getitem__(self, key: str) -> Any:
        return (self.model_extra or {})[key]

    def __contains__(self, key: str) -> bool:
        return key in (self.model_extra or {})

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value of the row, or `default`."""
        return (self.model_extra or {}).get(key, default)

    @property
    def metrics(self) -> dict[str, float]:
        """All numbers with a fraction, by key, in their order; those in METRIC_NAMES are between 0 and 1."""
        return {key: value for key, value in (self.model_extra or {}).items() if isinstance(value, float)}

    @property
    def settings(self) -> dict[str, Any]:
        """What is neither a metric nor an interval, such as the selected head or k."""
        return {
            key: value
            for key, value in (self.model_extra or {}).items()
            if key not in _NOT_SETTINGS and not isinstance(value, float)
        }

    @property
    def ci(self) -> tuple[float, float] | None:
        """The 95 % interval of the headline metric."""
        ends = self.get("ci")
        return None if ends is None else (ends[0], ends[1])

    @property
    def per_class(self) -> list[float | None] | None:
        """IoU by class; None for a class that occurs neither in the masks nor in the predictions."""
        return self.get("per_class")


class EvaluationResult(_Part):
    """The result of one protocol: a row for each encoder, and all that is needed to interpret and repeat it."""

    kind: str
    """linear, knn, segmentation, propagation, or diagnosis (which has no rows)."""
    level: int | None = None
    """Use of labels in segmentation. 0: only for scoring; 1: in a bank that is searched; 2: to train a layer."""
    protocol: dict[str, Any] = {}
    """All settings of the protocol."""
    image_size: tuple[int, int] | None = None
    """Height and width of the encoder's input in pixels; only in results of image classification."""
    seed: int | None = None
    data: Data = Data()
    chance: float | None = None
    """Headline metric of a constant answer: the most frequent class, or the mask of the first frame."""
    rows: tuple[ResultRow, ...] = ()
    versions: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the result should know."""
    seconds: float | None = None
    weights: dict[str, str] = {}
    """Labels of the evaluated weights by encoder; baselines have none."""
    weights_sha256: dict[str, str] = {}
    which: str = "target"
    commit: str | None = None
    devices: tuple[str, ...] = ()
    cpu: dict[str, Any] = {}
    precision: str | None = None
    """Data type of the encoder, such as float32."""
    numbers: dict[str, Any] = {}
    """Numbers of a diagnosis."""
    verdict: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: object = "result") -> Self:
        """Return the result that a JSON object holds; files of all earlier versions can be read.

        Args:
            values: the object.
            where: the file, for the error.

        Raises:
            UserError: the object is not the result of an evaluation.
        """
        hint = "give files that `ijepa evaluate` wrote"
        try:
            result = cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(where, f"is not a result of an evaluation ({key}: {first['msg'].lower()})", hint) from None
        if not result.rows and not result.numbers:
            raise UserError(where, "is not a result of an evaluation (no rows)", hint)
        return result

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object with the fields that are set, in a fixed order."""
        values = self.model_dump(mode="json", exclude_unset=True)
        if "notes" in values and self.kind not in ("linear", "knn"):
            # Files of these kinds have always had the notes after the weights.
            for key in ("notes", "weights_sha256", "which", "commit", "devices", "cpu", "precision"):
                if key in values:
                    values[key] = values.pop(key)
        return values

    @property
    def protocol_name(self) -> str:
        """Name of the protocol, or an empty string."""
        return str(self.protocol.get("name", ""))

    @property
    def title(self) -> str:
        """Title for a reader: kind, protocol, and the context encoder if that is what was evaluated."""
        name = KIND_NAMES.get(self.kind, self.kind)
        other = " (context encoder)" if self.which == "context" else ""
        return f"{name}, protocol {self.protocol_name}{other}" if self.protocol_name else name

    @property
    def headline(self) -> str | None:
        """Key of the main metric; None for kinds without one."""
        return HEADLINE.get(self.kind)

    def row(self, encoder: str) -> ResultRow | None:
        """Return the row of an encoder, or None."""
        return next((row for row in self.rows if row.encoder == encoder), None)
