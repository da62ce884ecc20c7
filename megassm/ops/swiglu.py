"""SwiGLU (arXiv 2002.05202), silu(gate) * up; on CUDA by a Triton kernel each way, where it is and is right.

torch's way is two kernels forward and three backward, and keeps silu(gate) too: 14 readings and writings of a hidden
number, where 8 do.

Shapes: any, the same of gate and up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops.kernel_check import agrees, has_triton, with_gradients

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`; torch rounds silu(gate) before it multiplies."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    alike = gate.is_cuda and gate.dtype == up.dtype
    if alike and not torch.compiler.is_compiling() and _is_right(gate.device, gate.dtype):
        product: Tensor = _Swiglu.apply(gate, up)  # type: ignore[no-untyped-call]
        return product
    return _truth(gate, up)


def _truth(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from megassm.ops import swiglu_triton

        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_triton.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from megassm.ops import swiglu_triton

        gate, up = ctx.saved_tensors
        return swiglu_triton.swiglu_backward(gate, up, grads[0].contiguous())


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    gate, up, gradient = ((3 * torch.randn(3, 1500, generator=generator)).to(device, dtype) for _ in range(3))
    return agrees(
        lambda: with_gradients(_Swiglu.apply, (gate, up), gradient),
        lambda: with_gradients(_truth, (gate, up), gradient),
        TOLERANCE[dtype], "SwiGLU", "torch's is",
    )  # fmt: skip
