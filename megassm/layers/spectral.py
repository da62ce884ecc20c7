"""The elastic spectral mixer (ES-SSM, arXiv 2601.22488; spectral filtering, arXiv 2312.06837).

    f_k(t) = sum_{s=0..t} phi_k(s) u_{t-s}                        the same K filters for every channel of u
    s(t)   = W2 gelu(W1 u_t + b1) + b2                            gate, hidden width d/2
    alpha  = softmax(sqrt(K) s_{1..K} / max(||s_{1..K}||, eps))   exactly 0 beyond K (Eq. 8b)
    y_t    = D u_t + sum_{k<=K} alpha_k(t) sigma_k^(1/4) M_k f_k(t)

That is the paper's layer. With H > 1 heads M_k is block-diagonal, H blocks of P = d/H, each head h has scores and
weights alpha_kh of its own, and the sum goes through an output projection O before it is added to D u_t: K d P + d^2
parameters instead of K d^2. With the sigmoid gate alpha_k = 2 sigmoid(s_k), neither rescaled nor normalised over K: a
smaller budget is then a partial sum, in which channel k means what it means at K_max.

With `selective` the past fades, head by head, by what is read (GLA, arXiv 2312.06635, and Mamba-2, arXiv 2405.21060,
do so too); one decay for all channels, so that a cut is what it was, and all of them still have one short state:

    f_k(t) = sum_{s=0..t} phi_k(s) exp(l(t-s+1) + .. + l(t)) u_{t-s},     l(t) = -sigmoid(w_h u_t + b_h)

Channels beyond the budget K are not computed. All M_k are ONE parameter (K_max, d, P), sliced inside the forward
pass: autograd then delivers a full gradient with zeros beyond K, and the set of parameters that get a gradient never
changes (it must not: DeepSpeed ZeRO-3 keeps stale gradients of a parameter that gets none). The price: under AdamW
a channel that sat out an update still moves by its momentum and its weight decay. That is deliberate, and mild:
a channel misses at most a few updates in a row (`budget.full_every`), while beta1 forgets within ten.

Shapes: B batch, L length, D width, H heads, P = D/H, K channels, F hidden width of the gate. The names of parameters
are those of the paper's form, and of the checkpoints there are: channels_KDD is (K, D, P), score_KH is (K H, F).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.model import ModelConfig, SigmaScale
from megassm.layers.context import Context
from megassm.layers.filterbank import FilterBank
from megassm.layers.selective import faded
from megassm.layers.spectral_state import SentState, SpectralState, WindowState, concatenated, taken_spectral
from megassm.layers.state import LayerState
from megassm.ops import gates
from megassm.ops.mixing import gate_weights, mix_channels, open_weights
from megassm.ops.selective import log_decays, parted, taken, with_decays


class SpectralGate(nn.Module):
    """u (B, L, D) -> alpha (B, L, H, k): input-dependent weights of the k leading channels.

    Args:
        d_model: D.
        num_channels: K_max.
        heads: H.
        normalised: weights of a head sum to 1 (softmax); otherwise each is 2 sigmoid of its score.
        rescale: Eq. 8b, for the softmax.
    """

    def __init__(self, d_model: int, num_channels: int, heads: int, normalised: bool, rescale: bool) -> None:
        super().__init__()
        hidden = max(1, d_model // 2)
        self.heads, self.normalised, self.rescale = heads, normalised, rescale
        self.hidden = nn.Linear(d_model, hidden)
        # channel by channel, and within a channel head by head: a budget's scores come first
        self._make_scores(hidden, num_channels * heads)

    def _make_scores(self, hidden: int, scores: int) -> None:
        self.score_KH = nn.Parameter(torch.empty(scores, hidden))
        self.score_bias_K = nn.Parameter(torch.empty(scores))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices start at standard deviation 1/sqrt(inputs), biases at 0."""
        for matrix in (self.hidden.weight, self.score_KH):
            nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
        for bias in (self.hidden.bias, self.score_bias_K):
            nn.init.zeros_(bias)

    @property
    def _gate(self) -> gates.Gate:
        if not self.normalised:
            return gates.Gate.OPEN
        return gates.Gate.RESCALED if self.rescale else gates.Gate.SOFTMAX

    def forward(self, u_BLD: Tensor, k: int) -> Tensor:
        """alpha (B, L, H, k) of the k leading channels, in at least float32."""
        hidden_BLF = F.gelu(self.hidden(u_BLD))
        scores_BLX = self._scores(hidden_BLF, k * self.heads)
        if gates.kernel_serves(scores_BLX, self.heads):
            return gates.weights(scores_BLX, self.heads, self._gate)
        scores_BLHK = torch.unflatten(scores_BLX, -1, (k, self.heads)).transpose(-1, -2)
        return gate_weights(scores_BLHK, self.rescale) if self.normalised else open_weights(scores_BLHK)

    def _scores(self, hidden_BLF: Tensor, count: int) -> Tensor:
        return F.linear(hidden_BLF, self.score_KH[:count], self.score_bias_K[:count])


class MixerSplit(Protocol):
    """Around the `mix` of one holder of a part of the inputs' channels (`megassm.parallel.tensor`)."""

    def enter(self, u_BLD: Tensor, weights_BLHK: Tensor) -> tuple[Tensor, Tensor]:
        """This part's channels of u, and the weights of its heads, with the log decays that may be behind them."""

    def leave(self, y_BLD: Tensor) -> Tensor:
        """The sum of what all parts give."""


class ContinuedSpectral(NamedTuple):
    """L inputs (B, L, D) that follow a state, of which some may be taken back."""

    filterbank: FilterBank
    u_BLD: Tensor
    state: SpectralState | None
    log_decay_BLH: Tensor | None

    def keep(self, counts: Sequence[int]) -> SpectralState:
        if len(set(counts)) == 1:
            return self._after(slice(None), counts[0], self.state)
        order: list[int] = []
        kept: list[SpectralState] = []
        for count in set(counts):
            rows = [row for row, other in enumerate(counts) if other == count]
            index = torch.tensor(rows, device=self.u_BLD.device)
            before = None if self.state is None else taken_spectral(self.state, index)
            kept.append(self._after(index, count, before))
            order += rows
        return taken_spectral(concatenated(kept), torch.tensor(order, device=self.u_BLD.device).argsort())

    def _after(self, rows: slice | Tensor, count: int, before: SpectralState | None) -> SpectralState:
        decays_BLH = taken(self.log_decay_BLH, (rows, slice(count)))
        after: SpectralState = self.filterbank.advance(self.u_BLD[rows, :count], before, decays_BLH)
        return after


class SpectralMixer(nn.Module):
    """u (B, L, D) -> y (B, L, D) with the k leading spectral channels.

    Args:
        config: of which D, K_max, H, the gate and whether it is selective are taken.
        sigma_scale: of this layer; "none" leaves out sigma_k^(1/4).

    What is made, and multiplied with, in methods of its own is made of other modules in `megassm.hf.layers`.
    """

    gate_module: ClassVar[type[SpectralGate]] = SpectralGate

    def __init__(self, config: ModelConfig, sigma_scale: SigmaScale) -> None:
        super().__init__()
        d_model, num_channels = config.d_model, config.num_channels
        self.sigma_scale = sigma_scale
        self.heads = config.mixer_heads
        self.split: MixerSplit | None = None
        self.normalised = config.gate in ("softmax", "equal")
        self.gate = (
            self.gate_module(d_model, num_channels, self.heads, self.normalised, config.gate_rescale)
            if config.has_gate
            else None
        )
        self.decay = nn.Linear(d_model, self.heads) if config.selective else None
        self.decay_start = config.decay_start
        self._make_matrices(d_model, num_channels)

    def _make_matrices(self, d_model: int, num_channels: int) -> None:
        self.channels_KDD = nn.Parameter(torch.empty(num_channels, d_model, d_model // self.heads))
        self.out_DD = nn.Parameter(torch.empty(d_model, d_model)) if self.heads > 1 else None
        self.direct_DD = nn.Parameter(torch.empty(d_model, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights from torch's random state: matrices at standard deviation 1/sqrt(inputs), and M_k, whose
        K_max products are added unnormalised without a softmax, at 1/sqrt(K_max) of it there; the gate's as it says.
        Decays start at their bias (`ModelConfig.decay_start`), and vary by the input.

        A model draws its own (`megassm.model.initial_weights`), by a seed and a parameter's name.
        """
        summands = 1 if self.normalised else len(self.channels_KDD)
        nn.init.normal_(self.channels_KDD, std=(self.channels_KDD.shape[-1] * summands) ** -0.5)
        for matrix in (self.direct_DD, self.out_DD):
            if matrix is not None:
                nn.init.normal_(matrix, std=matrix.shape[-1] ** -0.5)
        if self.gate is not None:
            self.gate.reset_parameters()
        if self.decay is not None:
            nn.init.normal_(self.decay.weight, std=self.decay.in_features**-0.5)
            nn.init.constant_(self.decay.bias, self.decay_start)

    def forward(self, u_BLD: Tensor, context: Context) -> Tensor:
        """y (B, L, D) at the context's budget."""
        return self._read(u_BLD, self._gates(u_BLD, context), context)

    def _read(self, u_BLD: Tensor, weights_BLHK: Tensor, context: Context) -> Tensor:
        if self.split is None:
            return self.mix(u_BLD, weights_BLHK, context)
        return self.split.leave(self.mix(*self.split.enter(u_BLD, weights_BLHK), context))

    def mix(self, u_BLD: Tensor, weights_BLHK: Tensor, context: Context) -> Tensor:
        """D u + O sum_k weights[k] M_k f_k. Linear in u, which may be a part of the inputs, as are M, O and D then."""
        assert context.filterbank is not None
        sent = context.filterbank.send_state(u_BLD)
        direct_BLD = self._direct(u_BLD)  # while the state is under way
        return direct_BLD + self._out(self._mixed(u_BLD, weights_BLHK, context, sent))

    def extend(self, u_BLD: Tensor, state: LayerState | None, context: Context) -> tuple[Tensor, ContinuedSpectral]:
        """(y (B, L, D) of L positions that follow those of `state`, what a state is kept from)."""
        assert context.filterbank is not None
        assert state is None or isinstance(state, (Tensor, WindowState))
        weights_BLHK = self._gates(u_BLD, context)
        if state is None:
            y_BLD = self._read(u_BLD, weights_BLHK, context)
        else:
            y_BLD = self._direct(u_BLD) + self._out(self._mixed_from(state, u_BLD, weights_BLHK, context))
        return y_BLD, ContinuedSpectral(context.filterbank, u_BLD, state, parted(weights_BLHK, context.k)[1])

    def step(self, u_BD: Tensor, state: SpectralState, context: Context) -> tuple[Tensor, SpectralState]:
        """(y (B, D) of one position, the state after it)."""
        assert context.filterbank is not None
        u_B1D = u_BD[:, None]
        log_decay_B1H = self.log_decays(u_B1D)
        if log_decay_B1H is not None:
            state = faded(state, log_decay_B1H[:, 0])
        features_BKD, state = context.filterbank.step(u_BD, state, context.k)
        weights_B1HK = self._weights(u_B1D, context)
        mixed_B1D = self._mixed_features(features_BKD[:, None], weights_B1HK)
        y_B1D = self._out(mixed_B1D) + self._direct(u_B1D)
        return y_B1D[:, 0], state

    def constant_divisor(self, k: int) -> int:
        """1/alpha of each of k channels without a gate."""
        return k if self.normalised else 1

    def _mixed(self, u_BLD: Tensor, weights_BLHK: Tensor, context: Context, sent: SentState | None) -> Tensor:
        assert context.filterbank is not None
        channels_KDP = self.channels_KDD[: context.k]
        return context.filterbank.mix(u_BLD, weights_BLHK, channels_KDP, context.segments, sent)

    def _mixed_from(self, state: SpectralState, u_BLD: Tensor, weights_BLHK: Tensor, context: Context) -> Tensor:
        assert context.filterbank is not None
        return context.filterbank.mix_from(u_BLD, state, weights_BLHK, self.channels_KDD[: context.k])

    def _mixed_features(self, features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
        return mix_channels(features_BLKD, weights_BLHK, self.channels_KDD[: features_BLKD.shape[2]])

    def _direct(self, u_BLD: Tensor) -> Tensor:
        return u_BLD @ self.direct_DD

    def _out(self, mixed_BLD: Tensor) -> Tensor:
        return mixed_BLD if self.out_DD is None else mixed_BLD @ self.out_DD

    def _gates(self, u_BLD: Tensor, context: Context) -> Tensor:
        """`_weights`, with the log decays behind them where the layer is selective."""
        weights_BLHK, log_decay_BLH = self._weights(u_BLD, context), self.log_decays(u_BLD)
        return weights_BLHK if log_decay_BLH is None else with_decays(weights_BLHK, log_decay_BLH)

    def log_decays(self, u_BLD: Tensor) -> Tensor | None:
        """l (B, L, H) of a selective layer."""
        return None if self.decay is None else log_decays(self.decay(u_BLD))

    def _weights(self, u_BLD: Tensor, context: Context) -> Tensor:
        """alpha_k sigma_k^(1/4), or alpha_k, (B, L, H, k), in at least float32."""
        assert context.filterbank is not None
        k = context.k
        scale_K = context.filterbank.scale(k, self.sigma_scale, torch.promote_types(u_BLD.dtype, torch.float32))
        if self.gate is not None:
            weights_BLHK: Tensor = self.gate(u_BLD, k)
            return weights_BLHK * scale_K.to(weights_BLHK.dtype)
        return (scale_K / self.constant_divisor(k)).expand(*u_BLD.shape[:-1], self.heads, k)
