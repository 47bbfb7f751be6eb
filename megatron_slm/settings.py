"""Types that settings share: numbers as people write them, paths and groups.

A settings class is a pydantic dataclass: its types define the valid values, and `__post_init__` checks combinations.
A `UserError` of a validator below names no setting, and one of a settings class names the setting without its group;
`config.py` adds the rest of the name.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict
from pydantic_core import PydanticUseDefault

from megatron_slm.errors import UserError

T = TypeVar("T")

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
"""Unknown settings, infinities and NaN are errors."""

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
_QUANTITY = re.compile(r"([+-]?[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?)\s*([KMBTkmbt]?)", re.ASCII)
_SURELY_QUANTITY = re.compile(r"[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+|[KMBT])", re.ASCII)
_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_quantity(value: Any) -> Any:
    """Return the number in a text such as 80e9, 80B, 80_000_000_000 or 0.1B; any other value unchanged."""
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    try:
        number = float(match[1].replace("_", "")) * _SUFFIX[match[2].upper()] if match else None
    except ValueError:
        number = None
    if number is None:
        return value
    return int(number) if number.is_integer() else number


def parse_foreign(value: Any) -> Any:
    """Return a group of another library's settings, with 1e-5, 5e8 and 80B as numbers; names and paths stay text."""
    if isinstance(value, dict):
        return {k: item if re.search("name|path", str(k)) else parse_foreign(item) for k, item in value.items()}
    if isinstance(value, list):
        return [parse_foreign(item) for item in value]
    return parse_quantity(value) if isinstance(value, str) and _SURELY_QUANTITY.fullmatch(value) else value


def expand_path(path: str) -> str:
    """Return a path with `~`, `$VAR` and `${VAR}` replaced, as a shell would.

    Raises:
        UserError: the path is empty, or names a variable or a user that does not exist.
    """
    if not path.strip():
        raise UserError("", path, "a path cannot be empty", "Name a path")
    for found in _VARIABLE.finditer(path):
        name = found[1] or found[2]
        if name not in os.environ:
            reason = f"the environment variable {name} is not set"
            raise UserError("", path, reason, f"Set {name}, or write the path in full")
    expanded = os.path.expanduser(os.path.expandvars(path))
    if expanded.startswith("~"):
        reason = f"this machine has no user {Path(path).parts[0][1:]}"
        raise UserError("", path, reason, "Write the path in full, or begin it with ./")
    return expanded


def _whole(value: Any) -> Any:
    """Return 8.0 as 8, because YAML reads 1.0e+9 as a float, and a strict int refuses all floats."""
    number = parse_quantity(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _default_if_empty(value: Any) -> Any:
    if value is None:
        raise PydanticUseDefault
    return value


# Strict, because pydantic would also take true for 1.
Whole = Annotated[int, Strict(), BeforeValidator(_whole)]
Number = Annotated[float, Strict(), BeforeValidator(parse_quantity)]
Switch = Annotated[bool, Strict()]

Positive = Annotated[T, Field(gt=0)]
NotNegative = Annotated[T, Field(ge=0)]
Share = Annotated[Number, Field(gt=0, le=1)]
"""A share above 0 and at most 1."""

Group = Annotated[T, BeforeValidator(_default_if_empty)]
"""A group with defaults; YAML reads a group without settings as null."""

Foreign = Annotated[Group[dict[str, Any]], BeforeValidator(parse_foreign)]
"""A group of another library's settings."""

PathText = Annotated[str, AfterValidator(expand_path)]
"""A path, or a name on the Hugging Face hub."""
