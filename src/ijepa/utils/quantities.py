"""Quantities in the notation of flags and files: `40 epochs`, `5 %`, `224`, `224x336`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator


class Duration(BaseModel):
    """A part of a run: a number of epochs, steps or images, or a percentage of the whole run.

    It is read from text such as `40 epochs`, `1 epoch` or `5 %`, or from a number of steps.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    amount: float = Field(ge=0)
    """Number of units."""
    unit: Literal["epochs", "steps", "images", "%"] = "steps"
    """Unit."""

    @model_serializer
    def __str__(self) -> str:
        return f"{self.amount:.12g} {self.unit}"

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, str):
            number, _, unit = value.replace("%", " %").strip().partition(" ")
            unit = unit.strip() or "steps"
            return {"amount": number, "unit": f"{unit}s" if unit in ("epoch", "step", "image") else unit}
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"amount": value}
        return value

    def steps(self, *, images: int, global_batch: int, total: int) -> int:
        """Return the whole number of steps, for a data set of `images` images and a run of `total` steps."""
        per_unit = {"epochs": images / global_batch, "images": 1 / global_batch, "%": total / 100, "steps": 1}
        return round(self.amount * per_unit[self.unit])


def _size(value: Any) -> Any:
    if isinstance(value, str):
        value = tuple(value.replace("x", " ").replace(",", " ").strip("[]()").split())
    if isinstance(value, int):
        value = (value, value)
    return tuple(value) * 2 if isinstance(value, list | tuple) and len(value) == 1 else value


Size = Annotated[tuple[int, int], BeforeValidator(_size)]
"""Height and width in pixels, or rows and columns of patches; a single number stands for both."""
