"""The network's layers with every matrix in a linear layer, where adapters and quantisers look for them.

The products are those of `megassm.layers` as long as the matrices are ordinary tensors: to the last bit, but where a
processor sums a few rows otherwise for a matrix that lies the other way round. What has taken a linear layer's place is
called instead, with the whole inputs; channels then cost their gated features, (B, L, K, D).

Shapes: B batch, L length, D width, H heads, G key-value heads, P = D/H, K channels, F hidden width of the gate,
T positions of a cache.
"""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from megassm.layers.attention import Attention
from megassm.layers.block import Block
from megassm.layers.context import Context
from megassm.layers.ffn import FeedForward, is_plain, leading
from megassm.layers.selective import faded
from megassm.layers.spectral import SpectralGate, SpectralMixer
from megassm.layers.spectral_state import SentState, SpectralState
from megassm.ops.kernel_check import is_exporting
from megassm.ops.mixing import gate_features, mix_channels
from megassm.ops.selective import parted


class LinearGate(SpectralGate):
    """`SpectralGate` whose scores are a linear layer, `score`."""

    def _make_scores(self, hidden: int, scores: int) -> None:
        self.score = nn.Linear(hidden, scores)

    def _scores(self, hidden_BLF: Tensor, count: int) -> Tensor:
        return leading(self.score, hidden_BLF, count)


class LinearMixer(SpectralMixer):
    """`SpectralMixer` whose matrices are linear layers: `channels`, `direct_proj` and, with several heads, `out_proj`.

    `channels` maps K*P gated features to D outputs. Its weight has the K P x P matrices of head h in the rows of that
    head, side by side, so that the leading columns are the leading channels: also of an adapter.
    """

    gate_module = LinearGate

    def _make_matrices(self, d_model: int, num_channels: int) -> None:
        self.channels = nn.Linear(num_channels * d_model // self.heads, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False) if self.heads > 1 else None
        self.direct_proj = nn.Linear(d_model, d_model, bias=False)

    def _mixed(self, u_BLD: Tensor, weights_BLHK: Tensor, context: Context, sent: SentState | None) -> Tensor:
        assert context.filterbank is not None
        if is_plain(self.channels) and not is_exporting():  # it groups by size
            channels_KDP = self._channels(context.k)
            return context.filterbank.mix(u_BLD, weights_BLHK, channels_KDP, context.segments, sent)
        weights_BLHK, log_decay_BLH = parted(weights_BLHK, context.k)
        features_BLKD = context.filterbank(u_BLD, context.k, context.segments, log_decay_BLH)
        return self._mixed_features(features_BLKD, weights_BLHK).to(u_BLD.dtype)

    def _mixed_from(self, state: SpectralState, u_BLD: Tensor, weights_BLHK: Tensor, context: Context) -> Tensor:
        assert context.filterbank is not None
        if is_plain(self.channels):
            return context.filterbank.mix_from(u_BLD, state, weights_BLHK, self._channels(context.k))
        weights_BLHK, log_decay_BLH = parted(weights_BLHK, context.k)
        features = []
        for position, u_BD in enumerate(u_BLD.unbind(1)):
            if log_decay_BLH is not None:
                state = faded(state, log_decay_BLH[:, position])
            features_BKD, state = context.filterbank.step(u_BD, state, context.k)
            features.append(features_BKD)
        return self._by_linear(torch.stack(features, dim=1), weights_BLHK).to(u_BLD.dtype)

    def _mixed_features(self, features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
        if is_plain(self.channels):
            return mix_channels(features_BLKD, weights_BLHK, self._channels(features_BLKD.shape[2]))
        return self._by_linear(features_BLKD, weights_BLHK)

    def _by_linear(self, features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
        gated_HBLX = gate_features(features_BLKD, weights_BLHK)
        weight = self.channels.weight
        if isinstance(weight, Tensor) and weight.dtype.is_floating_point:  # a quantised one says nothing of its inputs
            gated_HBLX = gated_HBLX.to(weight.dtype)
        # three dimensions: some quantised layers take no more
        mixed_XLD = leading(self.channels, gated_HBLX.flatten(0, 1), features_BLKD.shape[-1])
        mixed_HBLHP = mixed_XLD.unflatten(0, (self.heads, -1)).unflatten(-1, (self.heads, -1))
        return torch.cat([mixed_HBLHP[head, :, :, head] for head in range(self.heads)], dim=-1)

    def _direct(self, u_BLD: Tensor) -> Tensor:
        direct_BLD: Tensor = self.direct_proj(u_BLD)
        return direct_BLD

    def _out(self, mixed_BLD: Tensor) -> Tensor:
        if self.out_proj is None:
            return mixed_BLD
        out_BLD: Tensor = self.out_proj(mixed_BLD)
        return out_BLD

    def _channels(self, k: int) -> Tensor:
        width = self.channels.out_features // self.heads
        return stacked(self.channels.weight[:, : k * width], self.heads)


def stacked(weight: Tensor, heads: int) -> Tensor:
    """The M_k (K, D, P) of a weight of `LinearMixer.channels`; with one head a view of it."""
    weight_HEX = torch.unflatten(weight, 0, (heads, -1))
    weight_HEKP = torch.unflatten(weight_HEX, 2, (-1, weight_HEX.shape[1]))
    return weight_HEKP.permute(2, 0, 3, 1).flatten(1, 2)


def unstacked(channels_KDP: Tensor, heads: int) -> Tensor:
    """The weight (D, K*P) of `LinearMixer.channels` for the matrices M_k."""
    channels_KHPE = torch.unflatten(channels_KDP, 1, (heads, -1))
    return channels_KHPE.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


class HubAttention(Attention):
    """Attention that forms its weights where the context has a place for them, instead of torch's fused product."""

    def _attended(self, query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, context: Context) -> Tensor:
        if context.attentions is None:
            return super()._attended(query_BHLP, key_BGLP, value_BGLP, context)
        mask = context.mask
        assert mask is None or isinstance(mask, Tensor), "transformers' masks are dense"
        if mask is None:
            mask = torch.ones(query_BHLP.shape[2], key_BGLP.shape[2], dtype=torch.bool, device=query_BHLP.device).tril()
        return _by_weights(query_BHLP, key_BGLP, value_BGLP, mask, context.attentions)

    def _attended_cache(
        self, query_BHLP: Tensor, key_BGTP: Tensor, value_BGTP: Tensor, mask: Tensor | None, context: Context
    ) -> Tensor:
        if context.attentions is None:
            return super()._attended_cache(query_BHLP, key_BGTP, value_BGTP, mask, context)
        return _by_weights(query_BHLP, key_BGTP, value_BGTP, mask, context.attentions)


def _by_weights(
    query_BHLP: Tensor,
    key_BGTP: Tensor,
    value_BGTP: Tensor,
    mask: Tensor | None,
    attentions: MutableSequence[Tensor],
) -> Tensor:
    """Attention by its definition; the weights are left in `attentions`."""
    group = query_BHLP.shape[1] // key_BGTP.shape[1]
    key_BHTP, value_BHTP = (heads.repeat_interleave(group, dim=1) for heads in (key_BGTP, value_BGTP))
    scores_BHLT = query_BHLP @ key_BHTP.transpose(-1, -2) * query_BHLP.shape[-1] ** -0.5
    if mask is not None:
        scores_BHLT = scores_BHLT.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores_BHLT + mask
    weights_BHLT = scores_BHLT.softmax(dim=-1, dtype=torch.float32).to(query_BHLP.dtype)
    attentions.append(weights_BHLT)
    mixed_BHLP: Tensor = weights_BHLT @ value_BHTP
    return mixed_BHLP


class HubFeedForward(FeedForward):
    """Of linear layers by torch's own class, which is what some quantisers look for."""

    linear = nn.Linear


class HubBlock(GradientCheckpointingLayer, Block):
    """A block that transformers may compute again in backward."""

    spectral_mixer = LinearMixer
    attention = HubAttention
    feed_forward = HubFeedForward


def joined(attentions: Sequence[Tensor], layers: int) -> tuple[Tensor, ...]:
    """The weights (B, H, L, T) of every attention layer, of a text that was read in several parts one after another.

    A part's weights end with its own last position; what they do not reach is 0.
    """
    return tuple(_beside_each_other(list(attentions)[layer::layers]) for layer in range(layers))


def _beside_each_other(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    ends = [sum(part.shape[2] for part in parts[: i + 1]) for i in range(len(parts))]
    first = min(end - part.shape[3] for end, part in zip(ends, parts, strict=True))
    return torch.cat(
        [F.pad(part, (end - part.shape[3] - first, ends[-1] - end)) for end, part in zip(ends, parts, strict=True)],
        dim=2,
    )
