"""What a spectral layer remembers of the texts of a batch: one state of its filter bank, or two begun a hop apart; how
one is handed on where a sequence is held in parts.

Shapes: B batch, S states, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """Two states of a spectral layer, begun a hop apart (`megassm.layers.window`)."""

    older_BSD: Tensor
    """From the beginning of the hop before the last position's own, or of the text."""
    newer_BSD: Tensor
    """From the beginning of the last position's own hop."""
    lengths: tuple[int, ...]
    """Positions read of each text."""

    @property
    def nbytes(self) -> int:
        return self.older_BSD.nbytes + self.newer_BSD.nbytes

    @classmethod
    def joined(cls, states: Sequence[WindowState]) -> WindowState:
        """Texts of several, one after another."""
        older_BSD = torch.cat([state.older_BSD for state in states])
        newer_BSD = torch.cat([state.newer_BSD for state in states])
        return cls(older_BSD, newer_BSD, tuple(seen for state in states for seen in state.lengths))

    def take(self, rows: Tensor) -> WindowState:
        lengths = tuple(self.lengths[row] for row in rows.tolist())
        return WindowState(self.older_BSD[rows], self.newer_BSD[rows], lengths)

    def where(self, own_B: Tensor, other: WindowState) -> WindowState:
        """This state's texts where `own_B`, the other's, which are as long, elsewhere."""
        own_B11 = own_B[:, None, None]
        older_BSD = torch.where(own_B11, self.older_BSD, other.older_BSD)
        return WindowState(older_BSD, torch.where(own_B11, self.newer_BSD, other.newer_BSD), self.lengths)


class Carry(Protocol):
    """Hands the state from the holder of one part of a sequence to that of the next (`megassm.parallel.sequence`)."""

    def send(self, end_BSD: Tensor) -> Any:
        """Starts to tell the others the state after this part, had it started from zero; what `receive` wants."""

    def receive(self, sent: Any, power_SS: Tensor) -> Tensor:
        """The state (B, S, D) before this part; `power_SS` carries a state over a whole part."""


class SentState(NamedTuple):
    """A part's chunk states (B, N, S, D), had it started from zero, and what is under way to the other parts."""

    states_BNSD: Tensor
    sent: Any


SpectralState = Tensor | WindowState
"""(B, S, D), or two of them."""


def taken_spectral(state: SpectralState, rows: Tensor) -> SpectralState:
    """Of some of the texts."""
    return state[rows] if isinstance(state, Tensor) else state.take(rows)


def concatenated(states: Sequence[SpectralState]) -> SpectralState:
    """Texts of several states, one after another."""
    plain = [state for state in states if isinstance(state, Tensor)]
    if plain:
        return torch.cat(plain)
    return WindowState.joined([state for state in states if isinstance(state, WindowState)])
