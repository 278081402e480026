"""The base of every section of a configuration, and the kinds of values. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def _expanded(path: Path) -> Path:
    """The path with the home folder in place of a leading ~; ValueError if there is none, or for what is no path."""
    if "\0" in str(path):
        raise ValueError(f"found {str(path)!r}, required a path without NUL characters")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            f"found {path}, but there is no home folder of {path.parts[0]}; write the whole path"
        ) from None


LocalPath = Annotated[Path, Field(strict=False), AfterValidator(_expanded)]  # not strict: it is written as text


class Section(BaseModel):
    """Unknown keys, text for numbers and infinities are refused; values are read-only.

    The docstring below a key is its help text: `r1engine config --defaults` prints it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
