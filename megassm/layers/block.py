"""One block of the network: a mixer and a feed-forward layer, each behind a norm and beside a residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from megassm.config.model import ModelConfig, SigmaScale
from megassm.layers.attention import Attention
from megassm.layers.context import Context
from megassm.layers.ffn import FeedForward
from megassm.layers.spectral import SpectralMixer
from megassm.layers.state import Continued, ContinuedTaps, LayerState, TapsState
from megassm.layers.taps import InputTaps


class Block(nn.Module):
    """x + mixer(taps(norm(x))), then x + ffn(norm(x)); a `sigma_scale` of None makes the mixer attention."""

    spectral_mixer: ClassVar[type[SpectralMixer]] = SpectralMixer
    attention: ClassVar[type[Attention]] = Attention
    feed_forward: ClassVar[type[FeedForward]] = FeedForward

    def __init__(self, config: ModelConfig, sigma_scale: SigmaScale | None) -> None:
        super().__init__()
        d_model = config.d_model
        self.mixer_norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.taps = InputTaps(d_model, config.input_taps) if config.input_taps > 1 else None
        self.mixer: Any = (
            self.attention(d_model, config.n_heads, config.kv_heads, config.window)
            if sigma_scale is None
            else self.spectral_mixer(config, sigma_scale)
        )
        self.ffn_norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.ffn = self.feed_forward(d_model, config.d_ffn, config.ffn_width)
        self.compiled: Callable[[Block, Tensor, Context], Tensor] | None = None
        """`computed` as a program for training (`megassm.layers.compiled`)."""

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """The block's output (B, L, D)."""
        program = self.program
        return self.computed(x_BLD, context) if program is None else program(self, x_BLD, context)

    @property
    def program(self) -> Callable[[Block, Tensor, Context], Tensor] | None:
        """What is run in the place of `computed`, if anything is."""
        return self.compiled if self.training else None

    def computed(self, x_BLD: Tensor, context: Context) -> Tensor:
        """What `forward` gives, operation by operation."""
        u_BLD = context.without_padding(self.mixer_norm(x_BLD))
        if self.taps is not None:
            u_BLD = self.taps(u_BLD, context)
        return self._feed_forward(x_BLD + self.mixer(u_BLD, context), context)

    def extend(self, x_BLD: Tensor, state: LayerState | None, context: Context) -> tuple[Tensor, Continued]:
        """(the block's output at L positions that follow those of `state`, what a state is kept from)."""
        u_BLD = context.without_padding(self.mixer_norm(x_BLD))
        continued: Continued
        if self.taps is None:
            y_BLD, continued = self.mixer.extend(u_BLD, state, context)
        else:
            past_BTD, mixer_state = state if isinstance(state, TapsState) else (None, None)
            v_BLD, inputs_BXD = self.taps.extend(u_BLD, past_BTD, context)
            y_BLD, mixer_continued = self.mixer.extend(v_BLD, mixer_state, context)
            continued = ContinuedTaps(inputs_BXD, self.taps.taps - 1, mixer_continued)
        return self._feed_forward(x_BLD + y_BLD, context), continued

    def step(self, x_BD: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """(the block's output at one position, the state after it)."""
        if isinstance(self.mixer, Attention):
            y_BLD, continued = self.extend(x_BD[:, None], state, context)
            return y_BLD[:, 0], continued.keep([1] * len(x_BD))
        u_BD = self.mixer_norm(x_BD)
        if self.taps is None:
            y_BD, state = self.mixer.step(u_BD, state, context)
        else:
            assert isinstance(state, TapsState)
            v_B1D, inputs_BXD = self.taps.extend(u_BD[:, None], state.past_BTD, context)
            y_BD, mixer_state = self.mixer.step(v_B1D[:, 0], state.mixer, context)
            state = TapsState(inputs_BXD[:, 1:], mixer_state)
        return self._feed_forward(x_BD + y_BD, context), state

    def _feed_forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        out_BLD: Tensor = x_BLD + self.ffn(self.ffn_norm(x_BLD), context.k)
        return out_BLD
