"""Quantities as people write them in flags and files: `40 epochs`, `5 %`, `224`, `224x336`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class Length(BaseModel):
    """A stretch of a run: so many epochs, steps or images, or a percentage of the whole run."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    amount: float = Field(ge=0)
    """How many."""
    unit: Literal["epochs", "steps", "images", "%"] = "steps"
    """Of what."""

    def __str__(self) -> str:
        return f"{self.amount:.12g} {self.unit}"

    def steps(self, *, images: int, global_batch: int, total: int) -> int:
        """Turn into whole steps, for a data set of `images` images and a run of `total` steps."""
        per_unit = {"epochs": images / global_batch, "images": 1 / global_batch, "%": total / 100, "steps": 1}
        return round(self.amount * per_unit[self.unit])


def _length(value: Any) -> Any:
    if isinstance(value, str):
        number, _, unit = value.replace("%", " %").strip().partition(" ")
        value = {"amount": number, "unit": unit.strip() or "steps"}
        if value["unit"] + "s" in ("epochs", "steps", "images"):
            value["unit"] += "s"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = {"amount": value}
    return value


Stretch = Annotated[Length, BeforeValidator(_length), PlainSerializer(str)]


def _size(value: Any) -> Any:
    if isinstance(value, str):
        value = tuple(value.replace("x", " ").replace(",", " ").strip("[]()").split())
    if isinstance(value, int):
        value = (value, value)
    return tuple(value) * 2 if isinstance(value, list | tuple) and len(value) == 1 else value


Size = Annotated[tuple[int, int], BeforeValidator(_size)]
