"""The gated feed-forward layer, SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """x (B, L, D) -> (B, L, D) through a hidden width of `d_ffn`."""

    def __init__(self, d_model: int, d_ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_ffn, bias=False)
        self.up = nn.Linear(d_model, d_ffn, bias=False)
        self.down = nn.Linear(d_ffn, d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        mixed: Tensor = self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD))
        return mixed
