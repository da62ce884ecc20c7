"""The network's layers with every matrix in a linear layer, where adapters and quantisers look for them.

The products are those of `megassm.layers`, to the last bit, as long as the matrices are ordinary tensors. What has
taken a linear layer's place is called instead, with the whole inputs; channels then cost their gated features,
(B, L, K, D).

Shapes: B batch, L length, D width, H heads, P = D/H, K channels, F hidden width of the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from megassm.layers.block import Block
from megassm.layers.context import Context
from megassm.layers.ffn import LeadingLinear, leading
from megassm.layers.filterbank import SentState
from megassm.layers.spectral import SpectralGate, SpectralMixer
from megassm.ops.mixing import gate_features, mix_channels


class Matrix(LeadingLinear):
    """x (..., i) -> (..., o) by x M, the form in which the mixer's matrices are trained.

    The weight is M^T in the memory of M, (i, o) row by row, so that products are the same as in training.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.weight = nn.Parameter(self.weight.detach().view(d_in, d_out).t())


class LinearGate(SpectralGate):
    """`SpectralGate` whose scores are a linear layer, `score`."""

    def _make_scores(self, hidden: int, scores: int) -> None:
        self.score = LeadingLinear(hidden, scores, bias=True)

    def _scores(self, hidden_BLF: Tensor, count: int) -> Tensor:
        return leading(self.score, hidden_BLF, count)


class LinearMixer(SpectralMixer):
    """`SpectralMixer` whose matrices are linear layers: `channels`, `direct` and, with several heads, `output`.

    `channels` maps K*P gated features to D outputs. Its weight has the K P x P matrices of head h in the rows of that
    head, side by side, so that the leading columns are the leading channels: also of an adapter.
    """

    gate_module = LinearGate

    def _make_matrices(self, d_model: int, num_channels: int) -> None:
        self.channels = Matrix(num_channels * d_model // self.heads, d_model)
        self.output = Matrix(d_model, d_model) if self.heads > 1 else None
        self.direct = Matrix(d_model, d_model)

    def _mixed(self, u_BLD: Tensor, weights_BLHK: Tensor, context: Context, sent: SentState | None) -> Tensor:
        assert context.filterbank is not None
        if _is_plain(self.channels):
            channels_KDP = self._channels(context.k)
            return context.filterbank.mix(u_BLD, weights_BLHK, channels_KDP, context.segments, sent)
        features_BLKD = context.filterbank(u_BLD, context.k, context.segments)
        return self._by_linear(features_BLKD, weights_BLHK).to(u_BLD.dtype)

    def _mixed_from(self, state_BSD: Tensor, u_BLD: Tensor, context: Context) -> Tensor:
        assert context.filterbank is not None
        weights_BLHK = self._weights(u_BLD, context)
        if _is_plain(self.channels):
            return context.filterbank.mix_from(state_BSD, u_BLD, weights_BLHK, self._channels(context.k))
        features = []
        for u_BD in u_BLD.unbind(1):
            features_BKD, state_BSD = context.filterbank.step(u_BD, state_BSD, context.k)
            features.append(features_BKD)
        return self._by_linear(torch.stack(features, dim=1), weights_BLHK).to(u_BLD.dtype)

    def _mixed_features(self, features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
        if _is_plain(self.channels):
            return mix_channels(features_BLKD, weights_BLHK, self._channels(features_BLKD.shape[2]))
        return self._by_linear(features_BLKD, weights_BLHK)

    def _by_linear(self, features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
        gated_HBLX = gate_features(features_BLKD, weights_BLHK)
        dtype = self.channels.weight.dtype
        if dtype.is_floating_point:  # integers of a quantised layer say nothing of its inputs
            gated_HBLX = gated_HBLX.to(dtype)
        width = features_BLKD.shape[-1]
        mixed_HBLHP = torch.unflatten(leading(self.channels, gated_HBLX, width), -1, (self.heads, -1))
        return torch.cat([mixed_HBLHP[head, :, :, head] for head in range(self.heads)], dim=-1)

    def _direct(self, u_BLD: Tensor) -> Tensor:
        direct_BLD: Tensor = self.direct(u_BLD)
        return direct_BLD

    def _out(self, mixed_BLD: Tensor) -> Tensor:
        if self.output is None:
            return mixed_BLD
        out_BLD: Tensor = self.output(mixed_BLD)
        return out_BLD

    def _channels(self, k: int) -> Tensor:
        width = self.channels.out_features // self.heads
        return stacked(self.channels.weight[:, : k * width], self.heads)


def stacked(weight: Tensor, heads: int) -> Tensor:
    """The M_k (K, D, P) of a weight of `LinearMixer.channels`; with one head in its memory, if that is a `Matrix`'s."""
    weight_HEX = torch.unflatten(weight, 0, (heads, -1))
    weight_HEKP = torch.unflatten(weight_HEX, 2, (-1, weight_HEX.shape[1]))
    return weight_HEKP.permute(2, 0, 3, 1).flatten(1, 2).contiguous()


def unstacked(channels_KDP: Tensor, heads: int) -> Tensor:
    """The weight (D, K*P) of `LinearMixer.channels` for the matrices M_k."""
    channels_KHPE = torch.unflatten(channels_KDP, 1, (heads, -1))
    return channels_KHPE.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


class HubBlock(GradientCheckpointingLayer, Block):
    """A block that transformers may compute again in backward."""

    spectral_mixer = LinearMixer


def _is_plain(linear: nn.Module) -> bool:
    return isinstance(linear, LeadingLinear) and linear.is_plain
