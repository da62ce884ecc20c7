"""What a batch needs to be continued under transformers: S x d numbers a spectral layer and text, whatever was read."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from megassm.errors import UserError
from megassm.layers.state import DecodingState

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of a cache in outputs and calls: from transformers 5.24 on it is another."""
RECORDED = 128
"""Earlier states that are kept for `crop`."""


class MegaSSMCache(Cache):
    """The decoding state of a batch; empty until a model has read something."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: DecodingState | None = None
        self.real_BT: Tensor | None = None
        """False at padding, of what was read; None: there was none."""
        self.ahead = 0
        """Last positions of a first text whose states are to be recorded."""
        self._past: deque[DecodingState] | None = None

    def advance(self, state: DecodingState) -> None:
        """The state after one more position."""
        if self._past is not None and self.state is not None:
            self._past.append(self.state)
        self.state = state

    def read(self, mask_BL: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor | None:
        """Notes `length` more positions, of which `mask_BL` says what is padding; returns `real_BT` with them."""
        if mask_BL is None and self.real_BT is None:
            return None
        before = self.get_seq_length()
        real_BT = self.real_BT
        if real_BT is None:
            real_BT = torch.ones(batch, before, dtype=torch.bool, device=device)
        new_BL = torch.ones(batch, length, dtype=torch.bool, device=device) if mask_BL is None else mask_BL
        self.real_BT = torch.cat((real_BT[:, :before], new_BL), dim=1)
        return self.real_BT

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, padding included."""
        return 0 if self.state is None else self.state.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.state is not None

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.take(indices)
        if self.real_BT is not None:
            self.real_BT = self.real_BT[indices.to(self.real_BT.device)]
        if self._past is not None:
            self._past = deque((state.take(indices) for state in self._past), self._past.maxlen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return 0 if self.state is None else len(self.state.lengths)

    def activate_past_recording(self) -> None:
        """From now on the last states are kept, so that `crop` finds them."""
        if self._past is None:
            self._past = deque(maxlen=RECORDED)

    @property
    def is_recording(self) -> bool:
        return self._past is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Goes back by `-tokens_to_remove` positions.

        Raises:
            UserError: the state there was not kept.
        """
        count = abs(tokens_to_remove)
        if count == 0 or self.state is None:
            return
        if self._past is None or len(self._past) < count:
            known = 0 if self._past is None else len(self._past)
            raise UserError(
                f"the cache cannot go back {count} tokens: it has kept {known} earlier states; call "
                "activate_past_recording() before the tokens are read"
            )
        for _ in range(count):
            self.state = self._past.pop()
        self.state.rewind()
        if self.real_BT is not None:
            self.real_BT = self.real_BT[:, : self.state.position]

    def reset(self) -> None:
        self.state, self.real_BT = None, None
        if self._past is not None:
            self._past.clear()

    is_compileable = False
    is_croppable = True
    is_initialized = property(lambda self: self.state is not None)
    is_sliding = property(lambda self: [False] * len(self))
    is_linear = property(lambda self: [False] * len(self))
    """transformers takes "linear" for a cache that does not know how much it has read, and has all of it read again."""


def padding_mask(mask: Tensor | None, batch: int, length: int, before: int) -> Tensor | None:
    """The last `length` columns of an attention mask as truth values, (B, L); None for none.

    Raises:
        UserError: not of the text's shape; outside a compiled call also if padding stands inside a text.
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] not in (length, before + length):
        raise UserError(f"attention_mask is {tuple(mask.shape)}, the text {(batch, before + length)}: must be equal")
    real_BL = mask[:, -length:].bool()
    if not before and not torch.compiler.is_compiling():
        changes_B = (real_BL != F.pad(real_BL[:, :-1], (1, 0))).sum(1)
        if bool((changes_B > 2).any()) or not bool(real_BL.any(1).all()):
            raise UserError("attention_mask has a row that is no text with padding around it; pad on one side")
    return real_BL


def cache_field(cache: MegaSSMCache | None) -> dict[str, Any]:
    """The cache as an output's argument."""
    return {CACHE: cache}
