"""Which sections there are, in which order, and what each is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Found = dict[str, Any]
"""Figures by name; a section may give some early, so that they are there if the rest fails."""
Run = Callable[["Plan", Path], Iterator[Found]]


@dataclass(frozen=True)
class Plan:
    """What all sections share."""

    device: str
    quick: bool
    folder: Path
    """Of this start; gone at its end."""
    out: Path
    """What is to be kept."""
    threads: int = 1
    """Of the CPU, of a section that is not timed: several of those run at a time."""


@dataclass(frozen=True)
class Section:
    """One question to the machine."""

    name: str
    module: str
    function: str
    argument: str = ""
    order: int = 1
    timed: bool = False
    """Whether it must have the device for itself."""
    limit_s: float = 180.0

    @property
    def group(self) -> str:
        """checks, training or timed."""
        return "timed" if self.timed else "training" if self.module == "training" else "checks"

    def run(self, plan: Plan, folder: Path) -> Iterator[Found]:
        function = getattr(import_module(f"tools.bench.gpu.{self.module}"), self.function)
        found: Iterator[Found] = function(plan, folder, *([self.argument] if self.argument else []))
        return found


ARMS = ("zero0", "zero1", "zero2", "zero3", "fp32", "hybrid", "documents", "recompute", "distill", "heads", "elastic",
        "flex", "compile")  # fmt: skip
"""Kinds of training that are started through the launcher's own entry (`tools.bench.gpu.training`)."""


TIMED = {"rates_compiled": ("rates", "true")}
"""Function and argument, where they are not the section's name alone."""


def sections(quick: bool) -> list[Section]:
    """All of them; `order` sorts: first what needs no training, then what is trained, then what is timed, the most
    telling first. Of the checks those begin that have the least behind them, what compiles once more last."""
    checks = ("model", "filterbank", "kernels", "fused", "elementwise", "decoding")
    timed = ("machine", "rates", "heads", "rates_compiled", "sizes", "mixer", "profile", "memory")
    return [
        *(Section(name, "cases", name, order=1) for name in ("taps", "head_mixing")),
        Section("flex", "compiling", "attention", order=1),
        Section("compiled_bfloat16", "compiling", "compiled", "bfloat16", order=1),
        *(Section(name, "checks", name, order=1) for name in checks),
        Section("data", "training", "data", order=1),
        Section("compiled_float32", "compiling", "compiled", "float32", order=1),
        *(Section(f"train_{arm}", "training", "arm", arm, order=2) for arm in ARMS),
        Section("launcher", "training", "launcher", order=2),
        *(Section(name, "speed", *TIMED.get(name, (name, "")), 3 + i, True, 120 if quick else 600)
          for i, name in enumerate(timed)),
    ]  # fmt: skip
