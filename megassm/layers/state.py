"""What layers remember of a text, so that it can be continued by any number of tokens, and taken back.

A spectral layer's state is S x D numbers a sequence; an attention layer's the keys and values that later queries may
see. States are values: a step gives a new one and leaves the old one as it was. Keys and values are nevertheless
written in place, into space reserved for them: only a state that is continued twice pays for a copy, unless it says
first that nothing else is left of what came after it (`DecodingState.rewind`).

Shapes: B batch, L length, D width, S states, G key-value heads, P dimensions a head, T positions held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from megassm.errors import UserError
from megassm.layers.spectral_state import SpectralState, WindowState, concatenated

if TYPE_CHECKING:
    from megassm.layers.filterbank import FilterBank

SLACK = 64
"""Positions that a window has space for beyond those it needs, so that it is moved to the front once in so many."""


@dataclass
class _Buffers:
    """Memory for keys and values (B, G, capacity, P), and how many positions of each text the newest state holds."""

    key_BGTP: Tensor
    value_BGTP: Tensor
    newest: tuple[int, ...]

    def moved(self, firsts: Sequence[int], used: Sequence[int], capacity: int) -> _Buffers:
        """A copy with space for `capacity` positions, of positions first..used of each sequence."""
        size = (*self.key_BGTP.shape[:2], capacity, self.key_BGTP.shape[3])
        buffers = _Buffers(self.key_BGTP.new_zeros(size), self.value_BGTP.new_zeros(size), ())
        for row, (first, end) in enumerate(zip(firsts, used, strict=True)):
            buffers.key_BGTP[row, :, : end - first] = self.key_BGTP[row, :, first:end]
            buffers.value_BGTP[row, :, : end - first] = self.value_BGTP[row, :, first:end]
        buffers.newest = tuple(end - first for first, end in zip(firsts, used, strict=True))
        return buffers


class KeyValueCache(NamedTuple):
    """The rotated keys and the values of the last `used` positions of each sequence."""

    buffers: _Buffers
    used: tuple[int, ...]

    @classmethod
    def empty(cls, key_BGLP: Tensor, value_BGLP: Tensor) -> KeyValueCache:
        """Holds nothing, of as many sequences and heads as these."""
        capacity = (*key_BGLP.shape[:2], 0, key_BGLP.shape[3])
        nothing = (0,) * len(key_BGLP)
        return cls(_Buffers(key_BGLP.new_zeros(capacity), value_BGLP.new_zeros(capacity), nothing), nothing)

    def append(self, key_BGLP: Tensor, value_BGLP: Tensor, window: int | None) -> KeyValueCache:
        """With L more positions of every sequence; what no later query can see makes space for them."""
        buffers, used, length = self.buffers, self.used, key_BGLP.shape[2]
        capacity = buffers.key_BGTP.shape[2]
        if max(used) + length > capacity:
            firsts = [0 if window is None else max(0, count - window + 1) for count in used]
            needed = length + max(count - first for first, count in zip(firsts, used, strict=True))
            grown = max(needed, 2 * capacity) if window is None else max(needed, window - 1 + SLACK)
            buffers = buffers.moved(firsts, used, grown)
            used = buffers.newest
        elif buffers.newest != used:  # another state has been continued from here
            buffers = buffers.moved([0] * len(used), used, capacity)
        if len(set(used)) == 1:
            buffers.key_BGTP[:, :, used[0] : used[0] + length] = key_BGLP
            buffers.value_BGTP[:, :, used[0] : used[0] + length] = value_BGLP
        else:
            for row, first in enumerate(used):
                buffers.key_BGTP[row, :, first : first + length] = key_BGLP[row]
                buffers.value_BGTP[row, :, first : first + length] = value_BGLP[row]
        buffers.newest = tuple(count + length for count in used)
        return KeyValueCache(buffers, buffers.newest)

    def seen(self, length: int, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(keys, values, mask) that the last `length` positions of each sequence look at.

        The mask is True where a query may look, (L, T) or (B, 1, L, T); None where all may look at all.
        """
        before = [count - length for count in self.used]
        first = 0 if window is None else max(0, min(before) - window + 1)
        span = slice(first, max(self.used))
        key_BGTP, value_BGTP = self.buffers.key_BGTP[:, :, span], self.buffers.value_BGTP[:, :, span]
        alike = len(set(before)) == 1
        if length == 1 and alike:
            return key_BGTP, value_BGTP, None
        device = key_BGTP.device
        starts_B = torch.tensor(before[:1] if alike else before, device=device)
        queries_BL1 = (starts_B[:, None] + torch.arange(length, device=device))[..., None]
        age_BLT = queries_BL1 - torch.arange(first, span.stop, device=device)
        seen_BLT = (age_BLT >= 0) & (age_BLT < (window or span.stop))
        return key_BGTP, value_BGTP, seen_BLT[0] if alike else seen_BLT[:, None]

    def keep(self, length: int, counts: Sequence[int]) -> KeyValueCache:
        """Without all but the first `counts` of the last `length` positions, which are gone for good."""
        used = tuple(count - length + kept for count, kept in zip(self.used, counts, strict=True))
        self.buffers.newest = used
        return KeyValueCache(self.buffers, used)

    def fitted(self, window: int) -> KeyValueCache:
        """In no more memory than a window needs: a long text that was read at once has taken more."""
        capacity = window - 1 + SLACK
        if self.buffers.key_BGTP.shape[2] <= capacity:
            return self
        firsts = [max(0, count - window + 1) for count in self.used]
        buffers = self.buffers.moved(firsts, self.used, capacity)
        return KeyValueCache(buffers, buffers.newest)

    def rewind(self) -> None:
        self.buffers.newest = self.used

    def take(self, rows: Tensor) -> KeyValueCache:
        used = tuple(self.used[row] for row in rows.tolist())
        buffers = _Buffers(self.buffers.key_BGTP[rows], self.buffers.value_BGTP[rows], used)
        return KeyValueCache(buffers, used)

    def where(self, own_B: Tensor, other: KeyValueCache) -> KeyValueCache:
        """This cache's texts where `own_B`, the other's, which holds as many positions, elsewhere."""
        assert self.used == other.used
        span, own_B111 = slice(max(self.used)), own_B[:, None, None, None]
        key_BGTP = torch.where(own_B111, self.buffers.key_BGTP[:, :, span], other.buffers.key_BGTP[:, :, span])
        value_BGTP = torch.where(own_B111, self.buffers.value_BGTP[:, :, span], other.buffers.value_BGTP[:, :, span])
        return KeyValueCache(_Buffers(key_BGTP, value_BGTP, self.used), self.used)

    @property
    def nbytes(self) -> int:
        """Of the reserved memory, used or not."""
        return self.buffers.key_BGTP.nbytes + self.buffers.value_BGTP.nbytes


class SeparateCaches(NamedTuple):
    """A cache each of several texts of any lengths: they are put together and taken apart without a copy."""

    caches: tuple[KeyValueCache, ...]

    def rewind(self) -> None:
        for cache in self.caches:
            cache.rewind()

    def take(self, rows: Tensor) -> SeparateCaches:
        """One that is taken several times is copied."""
        taken, chosen = [], set()
        for row in rows.tolist():
            taken.append(self.caches[row].take(torch.zeros_like(rows[:1])) if row in chosen else self.caches[row])
            chosen.add(row)
        return SeparateCaches(tuple(taken))

    def where(self, own_B: Tensor, other: SeparateCaches) -> SeparateCaches:
        """This one's texts where `own_B`, the other's elsewhere."""
        pairs = zip(own_B.tolist(), self.caches, other.caches, strict=True)
        return SeparateCaches(tuple(mine if own else theirs for own, mine, theirs in pairs))

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)


MixerState = SpectralState | KeyValueCache | SeparateCaches
"""Of a spectral layer; keys and values of attention."""


class TapsState(NamedTuple):
    """Of a layer whose mixer has taps before it (`megassm.layers.taps`)."""

    past_BTD: Tensor
    """The last inputs, after zeros where there are fewer."""
    mixer: MixerState

    @property
    def nbytes(self) -> int:
        return self.past_BTD.nbytes + self.mixer.nbytes


LayerState = MixerState | TapsState


class Continued(Protocol):
    """What a layer has read of L more positions, not yet decided on."""

    def keep(self, counts: Sequence[int]) -> LayerState:
        """The state after the first `counts` positions of each sequence."""


class ContinuedTaps(NamedTuple):
    """The inputs (B, T + L, D) of L positions and of the T before them, and what the mixer has read."""

    inputs_BXD: Tensor
    before: int
    """T."""
    mixer: Continued

    def keep(self, counts: Sequence[int]) -> TapsState:
        rows = zip(self.inputs_BXD, counts, strict=True)
        past_BTD = torch.stack([inputs_XD[count : count + self.before] for inputs_XD, count in rows])
        mixer = self.mixer.keep(counts)
        assert not isinstance(mixer, TapsState)
        return TapsState(past_BTD, mixer)


class DecodingState(NamedTuple):
    """What a model needs to remember of the texts of a batch to continue them."""

    lengths: tuple[int, ...]
    """Tokens seen of each."""
    layers: list[LayerState]
    filterbank: FilterBank | None = None
    """That the spectral layers' states are of, where the model may get another one (`LanguageModel.grow`)."""

    @property
    def position(self) -> int:
        """Tokens seen of the longest."""
        return max(self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def check_budget(self, k: int) -> None:
        """UserError where the model had no such budget yet when these texts were begun."""
        if self.filterbank is not None and k > self.filterbank.num_channels:
            rule = f"this text was begun when the model had K_max = {self.filterbank.num_channels}"
            raise UserError(f"K = {k}: {rule}; read it again, from its first token, to continue it at more")

    def rewind(self) -> None:
        """Says that no state that came after this one will be used again: continuing from here costs no copy then."""
        for layer in self.layers:
            mixer = layer.mixer if isinstance(layer, TapsState) else layer
            if isinstance(mixer, (KeyValueCache, SeparateCaches)):
                mixer.rewind()

    def where(self, own_B: Tensor, other: DecodingState) -> DecodingState:
        """The state of this one's texts where `own_B`, of the other's, which are as long, elsewhere."""
        assert self.lengths == other.lengths
        pairs = zip(self.layers, other.layers, strict=True)
        return self._replace(layers=[_chosen(own_B, mine, theirs) for mine, theirs in pairs])

    def take(self, rows: Tensor) -> DecodingState:
        """The state of some of the texts, in the order of `rows`, one of them perhaps several times."""
        layers = [_taken(layer, rows) for layer in self.layers]
        return self._replace(lengths=tuple(self.lengths[row] for row in rows.tolist()), layers=layers)

    @classmethod
    def joined(cls, states: Sequence[DecodingState]) -> DecodingState:
        """The state of the texts of several, one after the other; keys and values stay where they are."""
        assert len({id(state.filterbank) for state in states}) == 1, "states of one model, at one size"
        layers = [_joined(layers) for layers in zip(*(state.layers for state in states), strict=True)]
        return cls(tuple(length for state in states for length in state.lengths), layers, states[0].filterbank)

    def parts(self) -> list[DecodingState]:
        """The state of each of the texts that `joined` has put together, a view of this one's memory."""
        layers = zip(*(_parts(layer, len(self.lengths)) for layer in self.layers), strict=True)
        owns = zip(self.lengths, layers, strict=True)
        return [DecodingState((length,), list(own), self.filterbank) for length, own in owns]


def _chosen(own_B: Tensor, mine: LayerState, theirs: LayerState) -> LayerState:
    if isinstance(mine, TapsState):
        assert isinstance(theirs, TapsState)
        past_BTD = torch.where(own_B[:, None, None], mine.past_BTD, theirs.past_BTD)
        mixer = _chosen(own_B, mine.mixer, theirs.mixer)
        assert not isinstance(mixer, TapsState)
        return TapsState(past_BTD, mixer)
    if isinstance(mine, KeyValueCache):
        assert isinstance(theirs, KeyValueCache)
        return mine.where(own_B, theirs)
    if isinstance(mine, SeparateCaches):
        assert isinstance(theirs, SeparateCaches)
        return mine.where(own_B, theirs)
    if isinstance(mine, WindowState):
        assert isinstance(theirs, WindowState)
        return mine.where(own_B, theirs)
    assert isinstance(theirs, Tensor)
    return torch.where(own_B[:, None, None], mine, theirs)


def _taken(layer: LayerState, rows: Tensor) -> LayerState:
    if isinstance(layer, TapsState):
        return TapsState(layer.past_BTD[rows], _taken_mixer(layer.mixer, rows))
    return _taken_mixer(layer, rows)


def _taken_mixer(state: MixerState, rows: Tensor) -> MixerState:
    return state[rows] if isinstance(state, Tensor) else state.take(rows)


def _joined(layers: Sequence[LayerState]) -> LayerState:
    if any(isinstance(layer, TapsState) for layer in layers):
        taps = [layer for layer in layers if isinstance(layer, TapsState)]
        mixer = _joined([layer.mixer for layer in taps])
        assert not isinstance(mixer, TapsState)
        return TapsState(torch.cat([layer.past_BTD for layer in taps]), mixer)
    spectral = [layer for layer in layers if isinstance(layer, (Tensor, WindowState))]
    if spectral:
        return concatenated(spectral)
    caches: list[KeyValueCache] = []
    for layer in layers:
        if isinstance(layer, SeparateCaches):
            caches += layer.caches
        elif isinstance(layer, KeyValueCache):
            assert len(layer.used) == 1, "only texts read by themselves are put together"
            caches.append(layer)
    return SeparateCaches(tuple(caches))


def _parts(layer: LayerState, count: int) -> Sequence[LayerState]:
    if isinstance(layer, Tensor):
        return torch.split(layer, 1)
    if isinstance(layer, TapsState):
        mixers = _parts(layer.mixer, count)
        return [TapsState(past, mixer) for past, mixer in zip(torch.split(layer.past_BTD, 1), mixers, strict=True)
                if not isinstance(mixer, TapsState)]  # fmt: skip
    if isinstance(layer, SeparateCaches):
        return layer.caches
    return [layer.take(torch.tensor([row])) for row in range(count)]


class Extension(NamedTuple):
    """L more tokens of every text, read but not yet decided on: see `LanguageModel.extend`."""

    before: tuple[int, ...]
    """Tokens seen of each text until then."""
    length: int
    layers: list[Continued]
    filterbank: FilterBank | None = None
    """As of `DecodingState`."""

    def keep(self, counts: Sequence[int] | None = None) -> DecodingState:
        """The state after the first `counts` of the L tokens of each text, or after all; to be called once."""
        kept = (self.length,) * len(self.before) if counts is None else tuple(counts)
        lengths = tuple(seen + count for seen, count in zip(self.before, kept, strict=True))
        return DecodingState(lengths, [layer.keep(kept) for layer in self.layers], self.filterbank)
