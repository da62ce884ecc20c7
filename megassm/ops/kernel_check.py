"""Whether Triton's kernels may be relied on here: there is a Triton, and they agree with torch on this device.

Each module asks once, outside of torch's inference mode, where the first use may be: no gradient is made in it.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Computed = Callable[[], Sequence[Tensor]]


def has_triton() -> bool:
    """Whether the package is installed; it is for Linux alone."""
    return importlib.util.find_spec("triton") is not None


def compiler_switch() -> str | None:
    """The environment variable that switches torch.compile off, if one does."""
    names = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
    return next((name for name in names if os.environ.get(name) == "1"), None)


def in_compiled_graph() -> bool:
    """Whether torch.compile reads this. What is more than elementwise is then a node of its graph, an operation of ours
    that runs as it does outside; an exported program, which others run, has torch's operations only."""
    return torch.compiler.is_compiling() and not is_exporting()


def is_exporting() -> bool:
    """Whether torch.export reads this. torch 2.11's own function says so of torch.compile too."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", False))


def agrees(found: Computed, truth: Computed, tolerance: float, kernel: str, instead: str, plural: bool = False) -> bool:
    """Whether what Triton computes is within `tolerance` of torch's, each tensor by its norm; warns where it is not.

    Args:
        found: by the kernel.
        truth: by torch.
        tolerance: largest norm of a difference, over the norm of the truth.
        kernel: its name in a warning, such as "gate".
        instead: what is used where it is wrong, such as "torch's is".
        plural: of the name.
    """
    try:
        mine = found()
    except Exception as error:  # a compiler's refusal has many types
        does = "do" if plural else "does"
        warnings.warn(f"Triton's {kernel} {does} not run here ({error}); {instead} used", stacklevel=3)
        return False
    for one, true in zip(mine, truth(), strict=True):
        off = float((one.double() - true.double()).norm() / true.double().norm())
        if not off < tolerance:
            are = "are" if plural else "is"
            warnings.warn(f"Triton's {kernel} {are} off by {off:.1e} here; {instead} used", stacklevel=3)
            return False
    return True


@torch.enable_grad()
def with_gradients(way: Callable[..., Tensor], given: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """(what `way` computes of those that are given, the gradient of each of them)."""
    given = [tensor.detach().requires_grad_() for tensor in given]
    found = way(*given)
    return found.detach(), *torch.autograd.grad(found, given, gradient)
