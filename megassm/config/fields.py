"""Types of the knobs, and what a section of them is."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

LARGEST = 2**53
"""Whole numbers beyond it are not exact as float64."""
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=2**24)]
"""Of one axis of a tensor; a larger one is a slip of the pen, or of a file that should exhaust the memory."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(gt=0, lt=1)]
UnitsPerChannel = Annotated[int, Field(ge=0, le=2**24, multiple_of=8)]

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
