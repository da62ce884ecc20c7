"""One block of the network: a mixer and a feed-forward layer, each behind a norm and beside a residual stream."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from megassm.config.model import ModelConfig, SigmaScale
from megassm.layers.attention import Attention
from megassm.layers.context import Context
from megassm.layers.ffn import FeedForward
from megassm.layers.spectral import SpectralMixer
from megassm.layers.state import Continued, LayerState


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); a `sigma_scale` of None makes the mixer attention."""

    spectral_mixer: ClassVar[type[SpectralMixer]] = SpectralMixer

    def __init__(self, config: ModelConfig, sigma_scale: SigmaScale | None) -> None:
        super().__init__()
        d_model = config.d_model
        self.mixer_norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.mixer: Any = (
            Attention(d_model, config.n_heads, config.kv_heads, config.window)
            if sigma_scale is None
            else self.spectral_mixer(
                d_model, config.num_channels, config.mixer_heads, config.gate, config.gate_rescale, sigma_scale
            )
        )
        self.ffn_norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.ffn = FeedForward(d_model, config.d_ffn, config.ffn_width)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        x_BLD = x_BLD + self.mixer(context.without_padding(self.mixer_norm(x_BLD)), context)
        return self._feed_forward(x_BLD, context)

    def extend(self, x_BLD: Tensor, state: LayerState | None, context: Context) -> tuple[Tensor, Continued]:
        """(the block's output at L positions that follow those of `state`, what a state is kept from)."""
        y_BLD, continued = self.mixer.extend(context.without_padding(self.mixer_norm(x_BLD)), state, context)
        return self._feed_forward(x_BLD + y_BLD, context), continued

    def step(self, x_BD: Tensor, state: LayerState, context: Context) -> tuple[Tensor, LayerState]:
        """(the block's output at one position, the state after it)."""
        if isinstance(self.mixer, Attention):
            y_BLD, continued = self.extend(x_BD[:, None], state, context)
            return y_BLD[:, 0], continued.keep([1] * len(x_BD))
        y_BD, state = self.mixer.step(self.mixer_norm(x_BD), state, context)
        return self._feed_forward(x_BD + y_BD, context), state

    def _feed_forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        out_BLD: Tensor = x_BLD + self.ffn(self.ffn_norm(x_BLD), context.k)
        return out_BLD
