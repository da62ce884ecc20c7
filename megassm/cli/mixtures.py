"""One K a layer on a command line, or a limit to search one under (`megassm.eval.mix`)."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple


class Limit(NamedTuple):
    """What a search for one K a layer must stay within."""

    what: Literal["parameters", "mflops", "ms"]
    """Parameters; forward MFLOPs a token; milliseconds of decoding a token."""
    most: float

    def __str__(self) -> str:
        return f"{self.what}={self.most:,.6g}"


def mixture_of_layers(text: str) -> tuple[int, ...]:
    """One K a layer, such as "16/8/4/8"; for argparse's `type`."""
    if not re.fullmatch(r"0*[1-9][0-9]{0,5}(/0*[1-9][0-9]{0,5})*", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: give one K a layer, such as 16/8/4/8")
    return tuple(map(int, text.split("/")))


def mixture(text: str) -> tuple[int, ...] | Limit:
    """`mixture_of_layers`, or a limit to search one under, such as "parameters=1.5e6"; for argparse's `type`."""
    what, equals, number = text.partition("=")
    if not equals:
        return mixture_of_layers(text)
    with contextlib.suppress(ValueError):
        if what in ("parameters", "mflops", "ms") and 0 < float(number) < math.inf:
            return Limit(what, float(number))  # type: ignore[arg-type]
    raise argparse.ArgumentTypeError(
        f"{text[:60]!r}: a limit is parameters=N, mflops=N (forward, a token) or ms=N (a decoded token)"
    )


def layers_text(layers: Sequence[int]) -> str:
    """One K a layer as `mixture` reads it."""
    return "/".join(map(str, layers))
