"""The causal convolution of every channel with the same K spectral filters.

    f[t, k] = sum_{s=0..t} phi[s, k] u[t - s]          for each of the D channels of u

Every way of computing it has one signature and agrees with `direct_filterbank`, the truth.

Shapes: B batch, L length, D channels, K filters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def direct_filterbank(u_BLD: Tensor, filters_LK: Tensor) -> Tensor:
    """Features (B, L, K, D) as one product with the Toeplitz matrices of the filters: O(L^2), any dtype.

    Args:
        u_BLD: input.
        filters_LK: the filters, at least L of their leading entries, in u's dtype.
    """
    length, num_filters = u_BLD.shape[1], filters_LK.shape[1]
    padded_SK = F.pad(filters_LK[:length], (0, 0, length - 1, 0))  # entry t - s + L - 1; zero for the future
    time = torch.arange(length, device=u_BLD.device)
    toeplitz_LSK = padded_SK[time[:, None] - time + length - 1]
    toeplitz_LKS = toeplitz_LSK.transpose(1, 2).reshape(length * num_filters, length)
    features: Tensor = toeplitz_LKS @ u_BLD
    return features.view(u_BLD.shape[0], length, num_filters, -1)


def fft_filterbank(u_BLD: Tensor, filters_LK: Tensor) -> Tensor:
    """Features (B, L, K, D) by FFT of twice the length: O(L log L), float32 or float64."""
    length = u_BLD.shape[1]
    size = 2 * length  # no wrap-around
    u_BFD = torch.fft.rfft(u_BLD, n=size, dim=1)
    filters_FK = torch.fft.rfft(filters_LK[:length], n=size, dim=0)
    features_BSKD: Tensor = torch.fft.irfft(filters_FK[:, :, None] * u_BFD[:, :, None, :], n=size, dim=1)
    return features_BSKD[:, :length]
