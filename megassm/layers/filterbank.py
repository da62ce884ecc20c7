"""The filters of a model as a module without parameters, one for all its spectral layers.

Filters are derived data: float64, recomputed or read from the cache, never in a checkpoint, never cast.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from torch import Tensor, nn

from megassm.errors import UserError
from megassm.ops.filterbank import direct_filterbank, fft_filterbank
from megassm.ops.hankel import spectral_filters

Method = Literal["auto", "direct", "fft"]

DIRECT_LENGTH = 512
"""Up to this length one Toeplitz product beats the FFT (CPU, see docs/LOG.md)."""


class FilterBank(nn.Module):
    """u (B, L, D) -> features (B, L, K, D) with the K leading spectral filters."""

    filters_LK: Tensor
    scale_K: Tensor

    def __init__(self, seq_len: int, num_channels: int, sigma_scale: str, method: Method) -> None:
        super().__init__()
        self.method = method
        self.sigma_scale = sigma_scale
        self.register_buffer("filters_LK", torch.empty(seq_len, num_channels, dtype=torch.float64), persistent=False)
        self.register_buffer("scale_K", torch.empty(num_channels, dtype=torch.float64), persistent=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Fills the buffers from `spectral_filters`."""
        sigma, phi = spectral_filters(*self.filters_LK.shape)
        self.filters_LK.copy_(torch.from_numpy(phi))
        self.scale_K.copy_(torch.from_numpy(sigma**0.25 if self.sigma_scale == "quarter_power" else sigma**0))

    def check_dtype(self) -> None:
        """Raises where something, such as an engine's `.bfloat16()`, has rounded the filters."""
        if self.filters_LK.dtype != torch.float64:
            raise RuntimeError(
                f"the spectral filters were cast to {self.filters_LK.dtype}; they must stay float64 until they are "
                "used, or channels beyond the first few are noise"
            )

    def scale(self, k: int, like: Tensor) -> Tensor:
        """sigma_k^(1/4), or ones, (k,), in `like`'s dtype."""
        return self.scale_K[:k].to(like.dtype)

    def forward(self, u_BLD: Tensor, k: int) -> Tensor:
        """Features (B, L, k, D) in at least float32: FFTs and long sums have no business in bfloat16."""
        length, limit = u_BLD.shape[1], self.filters_LK.shape[0]
        if length > limit:
            raise UserError(
                f"a sequence of {length} tokens: this model's filters were derived for model.seq_len = {limit}; "
                "pass at most that many tokens"
            )
        u_BLD = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        filters_LK = self.filters_LK[:, :k].to(u_BLD.dtype)
        match self.method:
            case "auto":
                compute = direct_filterbank if length <= DIRECT_LENGTH else fft_filterbank
                return compute(u_BLD, filters_LK)
            case "direct":
                return direct_filterbank(u_BLD, filters_LK)
            case "fft":
                return fft_filterbank(u_BLD, filters_LK)
        assert_never(self.method)
