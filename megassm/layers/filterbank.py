"""The filters of a model as a module without parameters, one for all its spectral layers.

Filters and the matrices made from them are derived data: float64, recomputed or read from the cache, never in a
checkpoint, never cast in place (`FilterBank._apply`); each use casts a copy to the dtype it computes in.

Shapes: B batch, L length, D width, K filters, H heads, E outputs of a head, C chunk, S states, I = C + S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Self, assert_never, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.model import CHUNK, Basis, SigmaScale
from megassm.errors import UserError
from megassm.layers import selective
from megassm.layers.spectral_state import Carry, SentState
from megassm.ops.bases import spectral_filters
from megassm.ops.documents import Segments, cut_into_rows
from megassm.ops.filterbank import (
    ChunkTables,
    MadeTables,
    check_flashfft,
    chunk_inputs,
    chunk_powers,
    chunk_states,
    chunked,
    chunked_filterbank,
    direct_filterbank,
    fft_filterbank,
    flashfft_filterbank,
    toeplitz_rows,
)
from megassm.ops.kernel_check import is_exporting
from megassm.ops.mixing import mix_channels, mix_rows
from megassm.ops.precision import without_autocast
from megassm.ops.realize import realize

Way = Literal["direct", "fft", "flashfft", "chunked"]
Method = Literal["auto"] | Way

GROWTH = 2.0
"""A filter that is continued to more than so many times its largest value is taken to grow without bound."""
DIRECT_LENGTH = 512
"""Up to this length one Toeplitz product beats the FFT (CPU, see docs/LOG.md)."""

BUFFERS = (
    "filters_LK", "scale_K", "transition_SS", "input_SC", "rows_CKI",
    "step_change_SS", "step_signs_S", "step_input_S", "step_output_KS",
)  # fmt: skip


class FilterBank(nn.Module):
    """The K leading filters of a basis applied to every channel of u, the way `method` says; a state is (B, S, D)."""

    filters_LK: Tensor
    scale_K: Tensor
    transition_SS: Tensor
    input_SC: Tensor
    rows_CKI: Tensor
    step_change_SS: Tensor
    """A1 less the diagonal of `step_signs_S`, to which it is so near that rounding A1 itself would show."""
    step_signs_S: Tensor
    step_input_S: Tensor
    step_output_KS: Tensor

    def __init__(self, seq_len: int, num_channels: int, method: Method, basis: Basis = "plus") -> None:
        super().__init__()
        self.seq_len, self.num_channels, self.basis = seq_len, num_channels, basis
        self.method = method
        self.carry: Carry | None = None
        self._made = MadeTables()
        for name in BUFFERS:  # sizes follow from the filters: see `reset`
            self.register_buffer(name, torch.empty(0, dtype=torch.float64), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What moves or casts a whole model (`.to`, `.bfloat16()`, an engine) moves the filters, and casts them not:
        rounded, the channels beyond the first few would be noise."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, moved in self._buffers.items():
            if moved is not None and moved.dtype != torch.float64:
                self._buffers[name] = cast(Tensor, exact[name]).to(moved.device)
        return self

    @torch.no_grad()
    def reset(self) -> None:
        """Fills the buffers from `spectral_filters` and `realize`."""
        sigma, phi = spectral_filters(self.seq_len, self.num_channels, self.basis)
        self._fill("filters_LK", phi)
        self._fill("scale_K", sigma**0.25)
        try:
            chunk = realize(self.seq_len, self.num_channels, CHUNK, self.basis)
        except UserError:  # so many filters at this length have no short recurrence
            if self.method == "chunked":
                raise
            return
        for name in ("transition_SS", "input_SC", "step_signs_S", "step_input_S", "step_output_KS"):
            self._fill(name, getattr(chunk, name))
        self._fill("step_change_SS", chunk.step_transition_SS - np.diag(chunk.step_signs_S))
        self._fill("rows_CKI", np.concatenate((chunk.toeplitz_CKC, chunk.output_CKS), axis=2))

    def _fill(self, name: str, value: npt.NDArray[np.float64]) -> None:
        setattr(self, name, torch.from_numpy(value).to(self.filters_LK.device))

    @property
    def state_size(self) -> int:
        """S, numbers a channel of u that `step` and the chunks carry along.

        Raises:
            UserError: these filters have no state.
        """
        size = self.transition_SS.shape[0]
        if size == 0:
            raise UserError(
                f"{self.num_channels} filters of length {self.seq_len} have no state-space form within tolerance, so "
                "there are no steps and nothing beyond that length; lower model.num_channels"
            )
        return size

    @torch.no_grad()
    def take(self, other: FilterBank) -> None:
        """Copies the leading filters of a larger bank."""
        k = self.num_channels
        for name in BUFFERS:
            setattr(self, name, getattr(other, name))
        self.filters_LK, self.scale_K = other.filters_LK[:, :k], other.scale_K[:k]
        self.rows_CKI, self.step_output_KS = other.rows_CKI[:, :k], other.step_output_KS[:k]

    def scale(self, k: int, choice: SigmaScale, dtype: torch.dtype) -> Tensor:
        """sigma_k^(1/4), or ones, (k,)."""
        scale_K = self.scale_K[:k].to(dtype)
        return scale_K if choice == "quarter_power" else torch.ones_like(scale_K)

    def way(self, length: int) -> Way:
        """How sequences of `length` are computed. `auto`: chunked, but direct where the state would be no shorter than
        the sequence: many filters of a short length have no short recurrence.

        An exported program has one graph for all lengths up to the trained one, which only the direct way has."""
        if is_exporting():
            return "direct"
        if self.method != "auto":
            return self.method
        if 0 < self.transition_SS.shape[0] < self.seq_len - 1:
            return "chunked"
        return "direct" if length <= DIRECT_LENGTH else "fft"

    def segments(self, documents_BL: Tensor, always_copies: bool = False) -> Segments:
        """How documents cut the rows in which sequences of this length are computed: chunks, or whole sequences."""
        length = documents_BL.shape[1]
        return cut_into_rows(documents_BL, CHUNK if self.way(length) == "chunked" else length, always_copies)

    @without_autocast
    def forward(
        self, u_BLD: Tensor, k: int, segments: Segments | None = None, log_decay_BLH: Tensor | None = None
    ) -> Tensor:
        """Features (B, L, k, D), in at least float32; with `segments`, made by `segments`, of each document alone."""
        u_BLD = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        if log_decay_BLH is not None:
            return selective.features(self, u_BLD, log_decay_BLH, k, segments)
        features_BLKD = self._features(u_BLD, k, segments)
        if segments is None or not segments.has_copies or self.way(u_BLD.shape[1]) == "chunked":
            return features_BLKD
        return segments.join(features_BLKD, self._features(segments.copies(u_BLD), k, None))

    def _features(self, u_BLD: Tensor, k: int, segments: Segments | None) -> Tensor:
        way = self.way(u_BLD.shape[1])
        match way:
            case "chunked":
                return chunked_filterbank(u_BLD, self.tables(u_BLD.dtype, k), segments)
            case "direct":
                return direct_filterbank(u_BLD, self.filters(u_BLD), k)
            case "fft":
                return fft_filterbank(u_BLD, self.filters(u_BLD), k)
            case "flashfft":
                _check_flashfft_once(self.seq_len, self.num_channels, self.basis, u_BLD.device)
                return flashfft_filterbank(u_BLD, self.filters(u_BLD), k)
        assert_never(way)

    @without_autocast
    def send_state(self, u_BLD: Tensor) -> SentState | None:
        """Starts to hand the state on, where u is a part of a sequence; L is then a multiple of CHUNK."""
        if self.carry is None:
            return None
        assert self.state_size
        u_BLD = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        states_BNSD = chunk_states(F.pad(chunked(u_BLD, CHUNK), (0, 0, 0, 0, 0, 1)), self.tables(u_BLD.dtype, 0))
        return SentState(states_BNSD[:, :-1], self.carry.send(states_BNSD[:, -1]))

    @without_autocast
    def mix(
        self,
        u_BLD: Tensor,
        weights_BLHK: Tensor,
        channels_KDE: Tensor,
        segments: Segments | None = None,
        sent: SentState | None = None,
    ) -> Tensor:
        """sum_k weights[k] * (features[k] @ channels[k]), (B, L, H*E), as `mix_channels` has it; features are kept by
        the FFT ways only.

        `sent` is what `send_state(u_BLD)` gave. Weights may have log decays behind them (`megassm.ops.selective`).
        """
        length, k = weights_BLHK.shape[1], len(channels_KDE)
        if weights_BLHK.shape[3] > k:
            return selective.mix(self, u_BLD, weights_BLHK, channels_KDE, segments)
        way = self.way(length)
        if way in ("fft", "flashfft"):
            return mix_channels(self(u_BLD, k, segments), weights_BLHK, channels_KDE)
        if u_BLD.device.type == "cpu":  # no fast bfloat16 products there
            u_BLD = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        if way == "direct":
            z_NID, rows_CKI = u_BLD, toeplitz_rows(self.filters(u_BLD)[:length, :k])
        else:
            tables = self.tables(u_BLD.dtype, k)
            states_BNSD = None if sent is None else self._received(sent)
            z_NID, rows_CKI = chunk_inputs(u_BLD, tables, segments, states_BNSD), tables.rows_CKI
        return mix_rows(z_NID, rows_CKI, weights_BLHK, channels_KDE, segments)

    def _received(self, sent: SentState) -> Tensor:
        """The chunk states of this part, with what came before it."""
        assert self.carry is not None
        dtype, count = sent.states_BNSD.dtype, sent.states_BNSD.shape[1]
        powers_MSS = chunk_powers(self.transition_SS, count + 1)
        before_BSD = self.carry.receive(sent.sent, powers_MSS[count].to(dtype))
        return sent.states_BNSD + powers_MSS[:count].to(dtype) @ before_BSD[:, None]

    @without_autocast
    def step(self, u_BD: Tensor, state_BSD: Any, k: int) -> tuple[Tensor, Any]:
        """(features (B, k, D) of one position, the state after it) from the state before it: any K at any position."""
        dtype = state_BSD.dtype
        u_B1D = u_BD.to(dtype)[:, None]
        first_K = self.filters_LK[0, :k].to(dtype)
        features_BKD = self.step_output_KS[:k].to(dtype) @ state_BSD + first_K[:, None] * u_B1D
        change_BSD = self.step_change_SS.to(dtype) @ state_BSD + self.step_input_S.to(dtype)[:, None] * u_B1D
        return features_BKD, torch.addcmul(change_BSD, self.step_signs_S.to(dtype)[:, None], state_BSD)

    @without_autocast
    def mix_from(self, u_BLD: Tensor, state_BSD: Any, weights_BLHK: Tensor, channels_KDE: Tensor) -> Tensor:
        """`mix` of L positions that follow those of a state: one short chunk of all, or whole chunks."""
        length, k = weights_BLHK.shape[1], len(channels_KDE)
        if weights_BLHK.shape[3] > k:
            return selective.mix_from(self, u_BLD, state_BSD, weights_BLHK, channels_KDE)
        if u_BLD.device.type == "cpu":
            u_BLD = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        tables = self.short_tables(u_BLD.dtype, k, length)
        if length <= CHUNK:
            z_NID = torch.cat((u_BLD, state_BSD.to(u_BLD.dtype)), dim=1)
        else:
            own_BNSD = chunk_states(chunked(u_BLD, CHUNK), tables)
            powers_NSS = chunk_powers(self.transition_SS, own_BNSD.shape[1]).to(state_BSD.dtype)
            z_NID = chunk_inputs(u_BLD, tables, None, own_BNSD.to(state_BSD.dtype) + powers_NSS @ state_BSD[:, None])
        return mix_rows(z_NID, tables.rows_CKI, weights_BLHK, channels_KDE, None)

    @without_autocast
    def advance(self, u_BLD: Tensor, state_BSD: Any, log_decay_BLH: Tensor | None = None) -> Any:
        """The state (B, S, D) after L more positions, in at least float32: all that later ones need, at any budget."""
        assert self.state_size
        dtype = torch.promote_types(u_BLD.dtype, torch.float32)
        u_BLD = u_BLD.to(dtype)
        if state_BSD is None:
            state_BSD = u_BLD.new_zeros(len(u_BLD), self.state_size, u_BLD.shape[2])
        if log_decay_BLH is not None:
            return selective.advance(self, u_BLD, state_BSD, log_decay_BLH)
        whole = u_BLD.shape[1] // CHUNK
        if whole:
            u_BNCD = F.pad(u_BLD[:, : whole * CHUNK], (0, 0, 0, CHUNK)).view(len(u_BLD), -1, CHUNK, u_BLD.shape[2])
            own_BSD = chunk_states(u_BNCD, self.tables(dtype, 0))[:, -1]
            state_BSD = self.carried(state_BSD, whole * CHUNK) + own_BSD
        rest = u_BLD.shape[1] - whole * CHUNK
        if rest:
            own_BSD = self.input_SC[:, CHUNK - rest :].to(dtype) @ u_BLD[:, whole * CHUNK :]
            state_BSD = self.carried(state_BSD, rest) + own_BSD
        return state_BSD

    def carried(self, state_BSD: Tensor, steps: int) -> Tensor:
        """A1^steps @ state, so many positions later: what it differs by from signs is rounded, as in a step."""
        chunks, rest = divmod(steps, CHUNK)
        signs_S = self.step_signs_S**steps
        power = (self._one_step(), steps) if rest else (self.transition_SS, chunks)
        change_SS = torch.linalg.matrix_power(*power) - signs_S.diag()
        dtype = state_BSD.dtype
        return torch.addcmul(change_SS.to(dtype) @ state_BSD, signs_S.to(dtype)[:, None], state_BSD)

    def _one_step(self) -> Tensor:
        """A1."""
        return self.step_change_SS + self.step_signs_S.diag()

    def tables(self, dtype: torch.dtype, k: int) -> ChunkTables:
        """The chunk's matrices for k filters in `dtype`; on a GPU made once, for every layer and update."""
        if self.transition_SS.is_cuda and not torch.compiler.is_compiling():
            return self._made.get(self.transition_SS, (dtype, k), lambda: self._tables(dtype, k))
        return self._tables(dtype, k)

    def _tables(self, dtype: torch.dtype, k: int) -> ChunkTables:
        identity_SS = torch.eye(len(self.transition_SS), dtype=torch.float64, device=self.filters_LK.device)
        change_SS = (self.transition_SS - identity_SS).float() if self.transition_SS.is_cuda else None
        return ChunkTables(self.transition_SS, self.input_SC.to(dtype), self.rows_CKI[:, :k].to(dtype), change_SS)

    def short_tables(self, dtype: torch.dtype, k: int, length: int) -> ChunkTables:
        """`tables`, of a chunk of `length` where that is shorter."""
        tables = self.tables(dtype, k)
        if length >= CHUNK:
            return tables
        rows_CKI = torch.cat((tables.rows_CKI[:length, :, :length], tables.rows_CKI[:length, :, CHUNK:]), dim=2)
        return tables._replace(input_SC=tables.input_SC[:, CHUNK - length :], rows_CKI=rows_CKI)

    def filters(self, u_BLD: Tensor) -> Tensor:
        """At least L rows of the filters, continued beyond the length they were made for, in u's dtype."""
        length = u_BLD.shape[1]
        if length <= self.seq_len:
            return self.filters_LK.to(u_BLD.dtype)
        return torch.cat((self.filters_LK, self._continued(length - self.seq_len))).to(u_BLD.dtype)

    @torch.no_grad()
    def steady_channels(self, length: int) -> int:
        """How many leading filters stay within `GROWTH` of their largest value where they are continued to `length`.

        High filters of a short length grow exponentially beyond it, by a factor of 300 at k = 32 and L = 2048; the
        lower ones fall (docs/LOG.md). All of them up to the length that they were made for.
        """
        if length <= self.seq_len or not self.transition_SS.shape[0]:
            return self.num_channels
        growth_K = self._continued(length - self.seq_len).abs().amax(0) / self.filters_LK.abs().amax(0)
        return int((growth_K > GROWTH).long().cumsum(0).eq(0).sum())

    def _continued(self, count: int) -> Tensor:
        """(count, K) rows after the last: the response q A1^(i-1) b of the state, so that all ways agree on them."""
        response_SC = self.input_SC.flip(1)  # A1^m b for m = 0..C-1
        power_SS = torch.linalg.matrix_power(self._one_step(), self.seq_len - 1)
        rows = []
        for _ in range(0, count, CHUNK):
            rows.append((self.step_output_KS @ (power_SS @ response_SC)).t())
            response_SC = self.transition_SS @ response_SC
        return torch.cat(rows)[:count]


@lru_cache
def _check_flashfft_once(seq_len: int, num_channels: int, basis: Basis, device: torch.device) -> None:
    """UserError where FlashFFTConv is missing or wrong; before its first result is used."""
    _, phi = spectral_filters(seq_len, num_channels, basis)
    check_flashfft(torch.from_numpy(phi).to(device), seq_len)
