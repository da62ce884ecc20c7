"""The elastic spectral mixer (ES-SSM, arXiv 2601.22488; spectral filtering, arXiv 2312.06837).

    f_k(t) = sum_{s=0..t} phi_k(s) u_{t-s}                        the same K filters for every channel of u
    s(t)   = W2 gelu(W1 u_t + b1) + b2                            gate, hidden width d/2
    alpha  = softmax(sqrt(K) s_{1..K} / max(||s_{1..K}||, eps))   exactly 0 beyond K (Eq. 8b)
    y_t    = D u_t + sum_{k<=K} alpha_k(t) sigma_k^(1/4) M_k f_k(t)

Channels beyond the budget K are not computed. All M_k are ONE parameter (K_max, d, d), sliced inside the forward
pass: autograd then delivers a full gradient with zeros beyond K, and the set of parameters that get a gradient never
changes (it must not: DeepSpeed ZeRO-3 keeps stale gradients of a parameter that gets none). The price: under AdamW
a channel that sat out an update still moves by its momentum and its weight decay. That is deliberate, and mild:
a channel misses at most a few updates in a row (`budget.full_every`), while beta1 forgets within ten.

Shapes: B batch, L length, D width, K channels, H hidden width of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.layers.context import Context
from megassm.ops.mixing import gate_weights, mix_channels


class SpectralGate(nn.Module):
    """u (B, L, D) -> alpha (B, L, k): input-dependent weights of the k leading channels, summing to 1."""

    def __init__(self, d_model: int, num_channels: int, rescale: bool) -> None:
        super().__init__()
        hidden = max(1, d_model // 2)
        self.rescale = rescale
        self.hidden = nn.Linear(d_model, hidden)
        self.score_KH = nn.Parameter(torch.empty(num_channels, hidden))
        self.score_bias_K = nn.Parameter(torch.empty(num_channels))

    def forward(self, u_BLD: Tensor, k: int) -> Tensor:
        hidden_BLH = F.gelu(self.hidden(u_BLD))
        scores_BLK = F.linear(hidden_BLH, self.score_KH[:k], self.score_bias_K[:k])
        return gate_weights(scores_BLK, self.rescale)


class SpectralMixer(nn.Module):
    """u (B, L, D) -> y (B, L, D) with the k leading spectral channels.

    Args:
        d_model: D.
        num_channels: K_max.
        gate: False gives every channel the weight 1/k (the ablation without input adaptivity).
        gate_rescale: False leaves out Eq. 8b (the ablation without RMS rescaling).
    """

    def __init__(self, d_model: int, num_channels: int, gate: bool, gate_rescale: bool) -> None:
        super().__init__()
        self.gate = SpectralGate(d_model, num_channels, gate_rescale) if gate else None
        self.channels_KDD = nn.Parameter(torch.empty(num_channels, d_model, d_model))
        self.direct_DD = nn.Parameter(torch.empty(d_model, d_model))

    def forward(self, u_BLD: Tensor, context: Context) -> Tensor:
        assert context.filterbank is not None
        k = context.k
        features_BLKD = context.filterbank(u_BLD, k)
        scale_K = context.filterbank.scale(k, like=features_BLKD)
        if self.gate is None:
            weights_BLK = (scale_K / k).expand(features_BLKD.shape[:-1])
        else:
            weights_BLK = self.gate(u_BLD, k) * scale_K
        mixed_BLD = mix_channels(features_BLKD, weights_BLK, self.channels_KDD[:k])
        return mixed_BLD + u_BLD @ self.direct_DD
