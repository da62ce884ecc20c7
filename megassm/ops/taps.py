"""A short causal convolution of each channel by itself, on CUDA by a Triton kernel each way, if it is right.

torch's way is two kernels a tap forward and five backward, each of which reads and writes all inputs.

Shapes: B batch, L length, D width, N taps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops.kernel_check import agrees, has_triton, with_gradients

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`; torch rounds after every tap."""


def kernel_serves(u_BLD: Tensor) -> bool:
    """Whether `causal_taps` computes these."""
    return u_BLD.is_cuda and not torch.compiler.is_compiling() and _is_right(u_BLD.device, u_BLD.dtype)


def causal_taps(u_BLD: Tensor, weight_ND: Tensor) -> Tensor:
    """v_t = sum_{i<N} w_i u_{t-i}, u being 0 before the first."""
    v_BLD: Tensor = _CausalTaps.apply(u_BLD, weight_ND)  # type: ignore[no-untyped-call]
    return v_BLD


class _CausalTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u_BLD: Tensor, weight_ND: Tensor) -> Tensor:
        from megassm.ops import taps_triton

        u_BLD, weight_ND = u_BLD.contiguous(), weight_ND.contiguous()
        ctx.save_for_backward(u_BLD, weight_ND)
        return taps_triton.causal_taps(u_BLD, weight_ND)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from megassm.ops import taps_triton

        u_BLD, weight_ND = ctx.saved_tensors
        return taps_triton.causal_taps_backward(u_BLD, weight_ND, grads[0].contiguous())


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    u_BLD, dv_BLD = (torch.randn(2, 150, 70, generator=generator).to(device, dtype) for _ in range(2))
    weight_ND = torch.randn(4, 70, generator=generator).to(device, dtype)
    return agrees(
        lambda: with_gradients(causal_taps, (u_BLD, weight_ND), dv_BLD),
        lambda: with_gradients(_truth, (u_BLD.float(), weight_ND.float()), dv_BLD.float()),
        TOLERANCE[dtype], "taps", "torch's are", plural=True,
    )  # fmt: skip


def _truth(u_BLD: Tensor, weight_ND: Tensor) -> Tensor:
    """As it is written."""
    length = u_BLD.shape[1]
    shifted = (F.pad(u_BLD, (0, 0, i, 0))[:, :length] * weight for i, weight in enumerate(weight_ND))
    return torch.stack(list(shifted)).sum(0)
