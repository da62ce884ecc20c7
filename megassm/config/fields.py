"""Types of the knobs, and what a section of them is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
UnitsPerChannel = Annotated[int, Field(ge=0, multiple_of=8)]

Budgets = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


def _as_tuple(value: object) -> object:
    """One choice for several; a list is what JSON has."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


def _gate_by_name(value: object) -> object:
    """What was true or false before gates had names."""
    return {True: "softmax", False: "equal"}[value] if isinstance(value, bool) else value


class Section(BaseModel):
    """A frozen group of knobs: no coercion, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
