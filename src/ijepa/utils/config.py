"""What every typed section of a recipe or protocol shares: frozen, unknown keys refused, errors as one line."""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ijepa.utils.errors import UserError, did_you_mean


class BaseConfig(BaseModel):
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
        except UserError as error:
            raise UserError(f"{where}: {error.where}", error.problem, error.hint) from None

    @classmethod
    def iter_fields(cls, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
        """Yield (dotted key, annotation, help text, default) of every field that is not itself a section."""
        for name, field in cls.model_fields.items():
            key, kind = prefix + (field.alias or name), config_class(field.annotation)
            if kind is not None:
                yield from kind.iter_fields(key + ".")
            else:
                yield key, field.annotation, " ".join((field.description or "").split()), field.default


def config_class(annotation: Any) -> type[BaseConfig] | None:
    """Return the section class an annotation stands for, or None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseConfig):
            return kind
    return None


def _refusal(cls: type[BaseConfig], error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"] if isinstance(part, str)]
    # Unions add the tried alternative's name to the location: keep the part that names fields.
    path: list[str] = []
    owner: type[BaseConfig] | None = cls
    for part in location:
        if owner is None:
            break
        path.append(part)
        fields = {field.alias or name: field for name, field in owner.model_fields.items()}
        if part not in fields:
            break
        owner = config_class(fields[part].annotation)
    key = ".".join(path) or "recipe"
    if first["type"] == "extra_forbidden":
        parent: type[BaseConfig] = cls
        for part in path[:-1]:
            parent = config_class({f.alias or n: f for n, f in parent.model_fields.items()}[part].annotation) or parent
        known = [field.alias or name for name, field in parent.model_fields.items()]
        return UserError(f"{where}: {key}", "unknown key", did_you_mean(path[-1], known))
    value, message = first.get("input"), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return UserError(f"{where}: {key}", "missing", "give it a value")
    # A union is refused once for each of its alternatives: the hint names them all.
    depth = len(first["loc"]) - len(location) + len(path)
    tried = [each for each in error.errors() if each["loc"][:depth] == first["loc"][:depth]]
    words = re.findall("'([^']*)'", str(first.get("ctx", {}).get("expected", "")))
    if isinstance(value, str) and words:
        hint = did_you_mean(value, words)
    else:
        wanted = dict.fromkeys(
            _WANTED[each["type"]].format(**each.get("ctx", {})) for each in tried if each["type"] in _WANTED
        )
        hint = "give " + " or ".join(wanted) if wanted else ""
    return UserError(f"{where}: {key} = {value!r}", message[:1].lower() + message[1:], hint)


_WANTED = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "a number"),
    **dict.fromkeys(("string_type",), "a word"),
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
}
"""What to give, by pydantic's names of what was wrong."""


def _pair(value: Any) -> Any:
    """Read `.9,.95`, `.9 .95` or `[.9, .95]` as a pair, as flags give them."""
    if isinstance(value, str):
        value = value.strip("[]() ").replace(",", " ").split()
    if not (isinstance(value, list | tuple) and len(value) == 2):
        raise ValueError("must be two numbers, such as .9,.95")
    return tuple(value)


def _ends(value: Any) -> Any:
    """Read a pair, or one number as both."""
    if isinstance(value, str) and len(value.strip("[]() ").replace(",", " ").split()) == 1:
        value = [value.strip("[](), ")]
    if isinstance(value, int | float):
        value = [value]
    return tuple(value) * 2 if isinstance(value, list | tuple) and len(value) == 1 else _pair(value)


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the low end is above the high end")
    return value


_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(gt=0)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[tuple[_Share, _Share], BeforeValidator(_ends), AfterValidator(_ascending)]
"""A closed interval within (0, 1], low first; flags and files may give `.15,.2`, `[.15, .2]` or one number."""
Ratios = Annotated[tuple[_Ratio, _Ratio], BeforeValidator(_ends), AfterValidator(_ascending)]
"""A closed interval above 0, given likewise."""
Decays = Annotated[tuple[_Decay, _Decay], BeforeValidator(_pair)]
"""Two decays within [0, 1), in any order."""
