"""A filter bank that never reads a filter beyond the length it was made for: texts of any length, in two states.

A filter is an eigenvector on [0, L). Continued beyond, the high ones grow by orders of magnitude
(`megassm.ops.hankel`), and no short system is the same filter within L and fades after it: its modes are large and
cancel each other there, so that one that is moved changes the filter itself. A position is given a window of the past
instead, as in training, where position t sees t positions before it. With hops of h = L/2, rounded up, position t sees
from the beginning of the hop before its own on,

    f_k(t) = sum_{s = w(t)..t} phi_k(t - s) u_s,      w(t) = max(0, (floor(t / h) - 1) h):      h to 2h - 1 positions

and all of the past up to L. Decoding carries two states of the plain bank, begun a hop apart: the older is read, and at
the end of a hop the newer takes its place and begins anew. Memory stays constant, twice the plain bank's.

Positions count from where a state began: padding on the left is in them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.layers.filterbank import FilterBank
from megassm.layers.spectral_state import SentState, WindowState
from megassm.ops.documents import Segments
from megassm.ops.selective import parted, taken


class WindowedFilterBank(FilterBank):
    """`FilterBank` by windows wherever a text is longer than the filters; the same within their length."""

    @property
    def hop(self) -> int:
        """h, positions."""
        return (self.seq_len + 1) // 2

    def steady_channels(self, length: int) -> int:
        """All: none is continued."""
        return self.num_channels

    def segments(self, documents_BL: Tensor, always_copies: bool = False) -> Segments:
        """Of the sequences, or of their windows."""
        length = documents_BL.shape[1]
        if length <= 2 * self.hop:
            return super().segments(documents_BL, always_copies)
        first_BH, last_BX = documents_BL[:, :1], documents_BL[:, -1:]  # numbers must not fall
        whole_BX = torch.cat((documents_BL, last_BX.expand(-1, -length % self.hop)), dim=1)
        before_BX = torch.cat((first_BH.expand(-1, self.hop), whole_BX[:, : -self.hop]), dim=1)
        both_BRXH = torch.cat((self._hops(before_BX), self._hops(whole_BX)), dim=2)
        return super().segments(both_BRXH.flatten(0, 1), always_copies)

    def forward(
        self, u_BLD: Tensor, k: int, segments: Segments | None = None, log_decay_BLH: Tensor | None = None
    ) -> Tensor:
        """Features (B, L, k, D)."""
        batch, length, width = u_BLD.shape
        if length <= 2 * self.hop:
            return super().forward(u_BLD, k, segments, log_decay_BLH)
        decays = None if log_decay_BLH is None else self._windows(log_decay_BLH)
        features = super().forward(self._windows(u_BLD), k, segments, decays)[:, self.hop :]
        return features.reshape(batch, -1, k, width)[:, :length]

    def mix(
        self,
        u_BLD: Tensor,
        weights_BLHK: Tensor,
        channels_KDE: Tensor,
        segments: Segments | None = None,
        sent: SentState | None = None,
    ) -> Tensor:
        """As `FilterBank.mix`."""
        length = u_BLD.shape[1]
        if length <= 2 * self.hop:
            return super().mix(u_BLD, weights_BLHK, channels_KDE, segments, sent)
        if segments is not None:
            windows = self._windows(u_BLD), self._windows(weights_BLHK)
            mixed_NHE = super().mix(*windows, channels_KDE, segments)[:, self.hop :]
            return mixed_NHE.reshape(len(u_BLD), -1, mixed_NHE.shape[2])[:, :length]
        rows_BRHD, weights_BRHXK = self._hops(u_BLD), self._hops(weights_BLHK)
        rows_NHD, weights_NHXK = rows_BRHD.flatten(0, 1), weights_BRHXK.flatten(0, 1)
        after_NSD: Tensor = super().advance(rows_NHD, None, parted(weights_NHXK, len(channels_KDE))[1])
        after_BRSD = after_NSD.reshape(len(u_BLD), -1, *after_NSD.shape[1:])
        before_NSD = F.pad(after_BRSD[:, :-1], (0, 0, 0, 0, 1, 0)).flatten(0, 1)
        mixed_NHE = super().mix_from(rows_NHD, before_NSD, weights_NHXK, channels_KDE)
        return mixed_NHE.reshape(len(u_BLD), -1, mixed_NHE.shape[2])[:, :length]

    def step(self, u_BD: Tensor, state: WindowState, k: int) -> tuple[Tensor, WindowState]:
        """(features (B, k, D) of one position, the state after it)."""
        state = self._turned(state)
        features_BKD, older_BSD = super().step(u_BD, state.older_BSD, k)
        _, newer_BSD = super().step(u_BD, state.newer_BSD, 1)
        return features_BKD, WindowState(older_BSD, newer_BSD, tuple(seen + 1 for seen in state.lengths))

    def mix_from(self, u_BLD: Tensor, state: WindowState, weights_BLHK: Tensor, channels_KDE: Tensor) -> Tensor:
        """`mix` of L positions that follow those of a state, hop by hop."""
        mixed_BLE = u_BLD.new_empty(0)
        for rows in _alike(state.lengths):
            index = torch.tensor(rows, device=u_BLD.device)
            mine, parts, first = state.take(index), [], 0
            while first < u_BLD.shape[1]:
                part = slice(first, first + self._left(mine.lengths[0]))
                mine, inputs_BLD = self._turned(mine), u_BLD[index, part]
                parts.append(super().mix_from(inputs_BLD, mine.older_BSD, weights_BLHK[index, part], channels_KDE))
                decays = parted(weights_BLHK[index, part], len(channels_KDE))[1]
                mine, first = self._read(mine, inputs_BLD, decays), part.stop
            mixed_RLE = torch.cat(parts, dim=1)
            if not mixed_BLE.numel():
                mixed_BLE = mixed_RLE.new_empty(len(u_BLD), *mixed_RLE.shape[1:])
            mixed_BLE[index] = mixed_RLE
        return mixed_BLE

    def advance(self, u_BLD: Tensor, state: WindowState | None, log_decay_BLH: Tensor | None = None) -> WindowState:
        """The state after L more positions."""
        batch, length = u_BLD.shape[:2]
        if state is None:
            last = max(0, length - 1) // self.hop * self.hop
            states = []
            for first in (max(0, last - self.hop), last):
                decays = taken(log_decay_BLH, (slice(None), slice(first, None)))
                states.append(super().advance(u_BLD[:, first:], None, decays))
            return WindowState(states[0], states[1], (length,) * batch)
        parts, order = [], []
        for rows in _alike(state.lengths):
            index = torch.tensor(rows, device=u_BLD.device)
            mine, first = state.take(index), 0
            while first < length:
                part = slice(first, first + self._left(mine.lengths[0]))
                decays = taken(log_decay_BLH, (index, part))
                mine, first = self._read(self._turned(mine), u_BLD[index, part], decays), part.stop
            parts.append(mine)
            order += rows
        return WindowState.joined(parts).take(torch.tensor(order, device=u_BLD.device).argsort())

    def _read(self, state: WindowState, u_BLD: Tensor, log_decay_BLH: Tensor | None) -> WindowState:
        """After positions of one hop."""
        older_BSD, newer_BSD = (FilterBank.advance(self, u_BLD, each, log_decay_BLH) for each in state[:2])
        return WindowState(older_BSD, newer_BSD, tuple(seen + u_BLD.shape[1] for seen in state.lengths))

    def _left(self, seen: int) -> int:
        """Positions of the hop that the next one is in, from it on."""
        return self.hop - seen % self.hop

    def _turned(self, state: WindowState) -> WindowState:
        """Where a hop begins, the newer state begins anew; its place before is the older's but at a text's second."""
        if all(seen % self.hop for seen in state.lengths):
            return state
        device = state.older_BSD.device
        seen_B11 = torch.tensor(state.lengths, device=device)[:, None, None]
        begins_B11 = seen_B11 % self.hop == 0
        older_BSD = torch.where(begins_B11 & (seen_B11 > self.hop), state.newer_BSD, state.older_BSD)
        return WindowState(older_BSD, state.newer_BSD.masked_fill(begins_B11 & (seen_B11 > 0), 0), state.lengths)

    def _hops(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B, R, h, ...), filled up with zeros."""
        padding = -x.shape[1] % self.hop
        padded = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, padding))
        return padded.reshape(len(x), -1, self.hop, *x.shape[2:])

    def _windows(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B * R, 2 h, ...): each hop after the one before it, the first after zeros."""
        rows = self._hops(x)
        before = torch.cat((torch.zeros_like(rows[:, :1]), rows[:, :-1]), dim=1)
        return torch.cat((before, rows), dim=2).flatten(0, 1)


def _alike(lengths: tuple[int, ...]) -> list[list[int]]:
    """The rows of texts of one length each."""
    rows: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        rows.setdefault(length, []).append(row)
    return list(rows.values())


def filter_bank(config: ModelConfig) -> FilterBank | None:
    """Of a model; None where no layer is spectral."""
    if "S" not in config.mixers:
        return None
    kind = WindowedFilterBank if config.beyond == "window" else FilterBank
    return kind(config.seq_len, config.num_channels, config.filterbank, config.basis)
