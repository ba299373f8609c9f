"""The base class of typed settings (recipes, protocols, label maps), and types of settings that several of them share.

Settings are frozen, unknown keys are errors, and every error is one line with the key, the value and a hint.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

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
        """Return validated settings; `where` is the name of the file or command in error messages.

        Raises:
            UserError: an unknown key, a missing key, or a value that is not allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _user_error(cls, error.errors(), where) from None
        except UserError as error:
            raise UserError(f"{where}: {error.where}", error.problem, error.hint) from None

    @classmethod
    def iter_fields(cls, prefix: str = "") -> Iterator[tuple[str, Any, str, Any]]:
        """Yield (dotted key, annotation, help text, default) of every field that is not itself a group."""
        for name, field in cls.model_fields.items():
            key, kind = prefix + (field.alias or name), config_class(field.annotation)
            if kind is not None:
                yield from kind.iter_fields(key + ".")
            else:
                yield key, field.annotation, " ".join((field.description or "").split()), field.default


def config_class(annotation: Any) -> type[BaseConfig] | None:
    """Return the group that an annotation stands for (`Group` or `Group | None`), or None."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseConfig):
            return kind
    return None


_ALLOWED = {
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_parsing", "float_type", "finite_number"), "a number"),
    "string_type": "a word",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
}
"""What a value has to be, by pydantic's type of the error; braces are filled from the context of the error."""


def _user_error(cls: type[BaseConfig], errors: list[ErrorDetails], where: str) -> UserError:
    """Return the first of pydantic's errors as one line."""
    first = errors[0]
    keys, fields = _keys(cls, first["loc"])
    where = f"{where}: {'.'.join(keys)}"
    if first["type"] == "extra_forbidden":
        return UserError(where, "unknown key", did_you_mean(keys[-1], fields))
    if first["type"] == "missing":
        return UserError(where, "missing", "give it a value")
    value, message = first["input"], first["msg"].removeprefix("Value error, ")
    # pydantic reports one error for each alternative of a union: the hint names all alternatives.
    tried = [each for each in errors if each["loc"][: len(keys)] == (*keys,) and each["input"] is value]
    return UserError(f"{where} = {value!r}", message[:1].lower() + message[1:], _hint(value, tried))


def _keys(cls: type[BaseConfig], location: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Return the parts of pydantic's location that are keys, and all keys of the group that the last one belongs to.

    The other parts are indices of a list, or names of the alternatives of a union.
    """
    keys: list[str] = []
    fields: dict[str, Any] = {}
    group: type[BaseConfig] | None = cls
    for part in location:
        if group is None:
            break
        keys.append(str(part))
        fields = {field.alias or name: field.annotation for name, field in group.model_fields.items()}
        group = config_class(fields.get(str(part)))
    return keys, list(fields)


def _hint(value: Any, tried: list[ErrorDetails]) -> str:
    choices = re.findall("'([^']*)'", str(tried[0].get("ctx", {}).get("expected", "")))
    if isinstance(value, str) and choices:
        return did_you_mean(value, choices)
    allowed = [_ALLOWED[each["type"]].format(**each.get("ctx", {})) for each in tried if each["type"] in _ALLOWED]
    return "give " + " or ".join(dict.fromkeys(allowed)) if allowed else ""


def _numbers(value: Any) -> Any:
    """Split the notation of flags, `.9,.95`, `.9 .95` or `[.9, .95]`, into a list."""
    return value.strip("[]() ").replace(",", " ").split() if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    value = _numbers(value)
    if not (isinstance(value, list | tuple) and len(value) == 2):
        raise ValueError("must be two numbers, such as .9,.95")
    return tuple(value)


def _interval(value: Any) -> Any:
    """Read two ends, or one number as both."""
    value = [value] if isinstance(value, int | float) else _numbers(value)
    return _pair(value * 2 if isinstance(value, list | tuple) and len(value) == 1 else value)


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the low end is above the high end")
    return value


_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(gt=0)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[tuple[_Share, _Share], BeforeValidator(_interval), AfterValidator(_ascending)]
"""A closed interval within (0, 1], low end first, from `.15,.2`, `[.15, .2]` or one number."""
Ratios = Annotated[tuple[_Ratio, _Ratio], BeforeValidator(_interval), AfterValidator(_ascending)]
"""A closed interval above 0, from the same notation."""
Decays = Annotated[tuple[_Decay, _Decay], BeforeValidator(_pair)]
"""Two decay rates within [0, 1), in any order."""
