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

from megassm.config.model import SigmaScale
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
        sigma_scale: "none" leaves out sigma_k^(1/4).
    """

    def __init__(
        self, d_model: int, num_channels: int, gate: bool, gate_rescale: bool, sigma_scale: SigmaScale
    ) -> None:
        super().__init__()
        self.sigma_scale = sigma_scale
        self.gate = SpectralGate(d_model, num_channels, gate_rescale) if gate else None
        self.channels_KDD = nn.Parameter(torch.empty(num_channels, d_model, d_model))
        self.direct_DD = nn.Parameter(torch.empty(d_model, d_model))

    def forward(self, u_BLD: Tensor, context: Context) -> Tensor:
        return self.mix(u_BLD, self._weights(u_BLD, context), context)

    def mix(self, u_BLD: Tensor, weights_BLK: Tensor, context: Context) -> Tensor:
        """D u + sum_k weights[k] M_k f_k. Linear in u, which may be a part of the inputs, as are M and D then."""
        assert context.filterbank is not None
        filterbank = context.filterbank
        sent = filterbank.send_state(u_BLD)
        direct_BLD = u_BLD @ self.direct_DD  # while the state is under way
        return direct_BLD + filterbank.mix(u_BLD, weights_BLK, self.channels_KDD[: context.k], context.segments, sent)

    def final_state(self, u_BLD: Tensor, context: Context) -> Tensor:
        """The state (B, S, D) after u: all that later positions need, at any budget."""
        assert context.filterbank is not None
        return context.filterbank.final_state(u_BLD)

    def step(self, u_BD: Tensor, state_BSD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(y (B, D) of one position, the state after it)."""
        assert context.filterbank is not None
        u_B1D = u_BD[:, None]
        features_BKD, state_BSD = context.filterbank.step(u_BD, state_BSD, context.k)
        weights_B1K = self._weights(u_B1D, context)
        mixed_B1D = mix_channels(features_BKD[:, None], weights_B1K, self.channels_KDD[: context.k])
        y_B1D: Tensor = mixed_B1D + u_B1D @ self.direct_DD
        return y_B1D[:, 0], state_BSD

    def _weights(self, u_BLD: Tensor, context: Context) -> Tensor:
        """alpha_k sigma_k^(1/4), or alpha_k, (B, L, k), in at least float32."""
        assert context.filterbank is not None
        k = context.k
        scale_K = context.filterbank.scale(k, self.sigma_scale, torch.promote_types(u_BLD.dtype, torch.float32))
        if self.gate is not None:
            weights_BLK: Tensor = self.gate(u_BLD, k)
            return weights_BLK * scale_K.to(weights_BLK.dtype)
        return (scale_K / k).expand(*u_BLD.shape[:-1], k)
