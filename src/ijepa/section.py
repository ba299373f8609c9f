"""What every typed section of a recipe or protocol shares: frozen, unknown keys refused, errors as one line."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from ijepa.errors import Refused, did_you_mean


class Section(BaseModel):
    """A frozen group of settings; the docstring under each field is its help text."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate `values`; `where` (a file or command) leads the one line that refuses them."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _refusal(cls, error, where) from None
        except Refused as error:
            raise Refused(f"{where}: {error.where}", error.problem, error.mend) from None

    @classmethod
    def leaves(cls, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
        """Yield (dotted key, annotation, help text) of every field that is not itself a section."""
        for name, field in cls.model_fields.items():
            key, kind = prefix + (field.alias or name), section_of(field.annotation)
            if kind is not None:
                yield from kind.leaves(key + ".")
            else:
                yield key, field.annotation, " ".join((field.description or "").split())


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section class an annotation stands for, or None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _refusal(cls: type[Section], error: ValidationError, where: str) -> Refused:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if isinstance(part, str)]
    # Unions add the tried alternative's name to the location: keep the part that names fields.
    path: list[str] = []
    owner: type[Section] | None = cls
    for part in location:
        if owner is None:
            break
        path.append(part)
        fields = {field.alias or name: field for name, field in owner.model_fields.items()}
        if part not in fields:
            break
        owner = section_of(fields[part].annotation)
    key = ".".join(path) or "recipe"
    if first["type"] == "extra_forbidden":
        parent: type[Section] = cls
        for part in path[:-1]:
            parent = section_of({f.alias or n: f for n, f in parent.model_fields.items()}[part].annotation) or parent
        known = [field.alias or name for name, field in parent.model_fields.items()]
        return Refused(f"{where}: {key}", "unknown key", did_you_mean(path[-1], known))
    value, message = first.get("input"), first["msg"].removeprefix("Value error, ")
    expected = first.get("ctx", {}).get("expected")
    mend = ""
    if first["type"] == "literal_error" and isinstance(value, str) and expected:
        mend = did_you_mean(value, [word.strip(" '") for word in str(expected).replace(" or ", ",").split(",")])
    if first["type"] == "missing":
        return Refused(f"{where}: {key}", "missing", "give it a value")
    return Refused(f"{where}: {key} = {value!r}", message[:1].lower() + message[1:], mend)


def _range(value: Any) -> Any:
    """Read `.15,.2`, `.15 .2` or one number as a pair, as flags give them."""
    if isinstance(value, str):
        parts = value.strip("[]() ").replace(",", " ").split()
        value = tuple(parts * 2 if len(parts) == 1 else parts)
    if isinstance(value, int | float):
        value = (value, value)
    if not (isinstance(value, list | tuple) and len(value) == 2):
        raise ValueError("must be two numbers, low and high, such as .15,.2")
    if float(value[0]) > float(value[1]):
        raise ValueError("the low end is above the high end")
    return tuple(value)


Range = Annotated[tuple[float, float], BeforeValidator(_range)]
"""A closed interval, low first; flags and files may give `.15,.2`, `[.15, .2]` or one number."""
