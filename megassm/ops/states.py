"""`filterbank.chunk_inputs` by one Triton kernel each way, on devices where it is and is right.

Shapes: B sequences, L length, D channels, N chunks of all sequences, C chunk, S states, I = C + S.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megassm.ops.kernel_check import agrees, has_triton, with_gradients

MOST_STATES = 128
"""Whose recurrence fits the registers and the shared memory of a CUDA core."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
"""Of the norm, for `_is_right`: float32's recurrence has an error of 3e-6 at 2,048 positions (H100)."""


def kernel_fits(u_BLD: Tensor, input_SC: Tensor) -> bool:
    """Whether the kernel is made for these; if it is right on their device, `kernel_serves` says."""
    return u_BLD.device.type == "cuda" and len(input_SC) <= MOST_STATES


def kernel_serves(u_BLD: Tensor, input_SC: Tensor) -> bool:
    """Whether `chunk_inputs` of this module computes these."""
    return kernel_fits(u_BLD, input_SC) and _is_right(u_BLD.device, u_BLD.dtype)


def chunk_inputs(u_BLD: Tensor, transition_SS: Tensor, input_SC: Tensor, change_SS: Tensor | None = None) -> Tensor:
    """[U_c ; x_c] (N, I, D); `transition` is A in float64, `change` A - 1 in float32 where it is known already."""
    if change_SS is None:
        one_SS = torch.eye(len(transition_SS), dtype=transition_SS.dtype, device=transition_SS.device)
        change_SS = (transition_SS - one_SS).float()
    inputs: Tensor = _ChunkInputs.apply(u_BLD, change_SS, input_SC)  # type: ignore[no-untyped-call]
    return inputs


def chunk_inputs_backward(dz_NID: Tensor, change_SS: Tensor, input_SC: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of u, which is in `shape`."""
    from megassm.ops import states_triton

    return states_triton.chunk_inputs_backward(dz_NID, change_SS, input_SC, shape)


class _ChunkInputs(torch.autograd.Function):
    """Linear in u: nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, u_BLD: Tensor, change_SS: Tensor, input_SC: Tensor) -> Tensor:
        from megassm.ops import states_triton

        ctx.save_for_backward(change_SS, input_SC)
        ctx.shape = u_BLD.shape
        return states_triton.chunk_inputs(u_BLD, change_SS, input_SC)

    @staticmethod
    def backward(ctx: Any, dz_NID: Tensor) -> tuple[Tensor, None, None]:
        change_SS, input_SC = ctx.saved_tensors
        return chunk_inputs_backward(dz_NID, change_SS, input_SC, ctx.shape), None, None


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    states, chunk = 44, 64
    near_one = 1 - torch.logspace(-7, -0.3, states, dtype=torch.float64)
    inputs_SC = torch.randn(states, chunk, generator=generator) / 8
    u_BLD = torch.randn(2, 300, 40, generator=generator).to(device, dtype)
    dz_NID = torch.randn(10, chunk + states, 40, generator=generator).to(device, dtype)
    tables = (near_one.diag().to(device), inputs_SC.to(device, dtype))
    return agrees(
        lambda: with_gradients(lambda u_BLD: chunk_inputs(u_BLD, *tables), (u_BLD,), dz_NID),
        lambda: with_gradients(lambda u_BLD: _truth(u_BLD, *tables), (u_BLD.double(),), dz_NID.double()),
        TOLERANCE[dtype], "recurrence", "torch's products are",
    )  # fmt: skip


def _truth(u_BLD: Tensor, transition_SS: Tensor, input_SC: Tensor) -> Tensor:
    """By the recurrence as it is written."""
    states, chunk = input_SC.shape
    batch, length, width = u_BLD.shape
    x_BSD = u_BLD.new_zeros(batch, states, width)
    rows = []
    for u_BCD in torch.split(torch.nn.functional.pad(u_BLD, (0, 0, 0, -length % chunk)), chunk, dim=1):
        rows.append(torch.cat((u_BCD, x_BSD), dim=1))
        x_BSD = transition_SS.to(u_BLD.dtype) @ x_BSD + input_SC.to(u_BLD.dtype) @ u_BCD
    return torch.stack(rows, dim=1).flatten(0, 1)
