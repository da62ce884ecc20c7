"""One elastic spectral layer by itself, with its own filters: for models that are not `megassm.model.LanguageModel`."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megassm.config.model import Basis, Gate, ModelConfig, SigmaScale
from megassm.errors import UserError
from megassm.layers.context import Context
from megassm.layers.filterbank import FilterBank, Method
from megassm.layers.spectral import SpectralMixer
from megassm.ops.documents import check_documents


class SpectralChoices(TypedDict, total=False):
    """What can be chosen of a layer; meanings and defaults are those of `megassm.ModelConfig`."""

    basis: Basis
    mixer_heads: int
    gate: Gate
    gate_rescale: bool
    gate_bias_init: float
    selective: bool
    sigma_scale: SigmaScale
    filterbank: Method


class SpectralLayer(nn.Module):
    """x (B, L, d_model) -> y (B, L, d_model), causal, with as many of its spectral channels as the call says.

        layer = SpectralLayer(d_model=256, seq_len=1024, num_channels=16)
        y = layer(x)         all channels
        y = layer(x, k=4)    the 4 leading ones; the others are not computed

    It has neither norm nor residual connection. L may be any length, also beyond `seq_len`. Under autocast its products
    are computed in autocast's dtype and its recurrence in float32, as in training by this package. The filters are
    derived from `seq_len` and `num_channels`, stay float64 under every cast, and are not in the `state_dict`.

    Args:
        d_model: width D.
        seq_len: the length, in positions, that the filters are derived for: that of the sequences to train on.
        num_channels: K_max, at most `seq_len` and 128.
        choices: basis, mixer_heads, gate, gate_rescale, gate_bias_init, selective, sigma_scale, filterbank of
            `megassm.ModelConfig`.

    Raises:
        UserError: a value out of range.
    """

    def __init__(self, d_model: int, seq_len: int, num_channels: int = 32, **choices: Unpack[SpectralChoices]) -> None:
        super().__init__()
        self.config = config = _checked(d_model, seq_len, num_channels, choices)
        self.mixer = SpectralMixer(config, config.sigma_scale[0])
        self.filterbank = FilterBank(seq_len, num_channels, config.filterbank, config.basis)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights from torch's random state, and the filters; after `to_empty` too."""
        self.mixer.reset_parameters()
        if self.mixer.gate is not None:
            nn.init.constant_(self.mixer.gate.score_bias_K, self.config.gate_bias_init)
        self.filterbank.reset()

    def forward(self, x_BLD: Tensor, k: int | None = None, documents_BL: Tensor | None = None) -> Tensor:
        """y (B, L, D) at budget k.

        Args:
            x_BLD: inputs, in the dtype of the parameters, or under autocast in any.
            k: channels in use, 1 <= k <= K_max; None: all.
            documents_BL: the number of each position's document, which must not fall along a sequence: no position
                then sees another document. None: a sequence is one document.

        Raises:
            UserError: a budget out of range, x of another width, or document numbers that fall.
        """
        self._check_width(x_BLD, 3)
        context = self._context(k)
        if documents_BL is not None:
            check_documents(documents_BL, x_BLD[..., 0])
            context = context._replace(segments=self.filterbank.segments(documents_BL))
        x_BLD = _as_autocast(x_BLD)
        y_BLD: Tensor = self.mixer(x_BLD, context)
        return y_BLD.to(x_BLD.dtype)

    def state(self, x_BLD: Tensor, state_BSD: Tensor | None = None) -> Tensor:
        """The state (B, S, D) after x, in at least float32: all that `step` needs of the past, at any budget.

        `state_BSD` is the state before x; None begins a sequence.

        Raises:
            UserError: so many filters at so short a `seq_len` have no state.
        """
        self._check_width(x_BLD, 3)
        x_BLD = _as_autocast(x_BLD)
        after_BSD: Tensor = self.filterbank.advance(x_BLD, state_BSD, self.mixer.log_decays(x_BLD))
        return after_BSD

    def step(self, x_BD: Tensor, state_BSD: Tensor | None = None, k: int | None = None) -> tuple[Tensor, Tensor]:
        """(y (B, D) of one position, the state after it); k may differ from step to step.

        `state_BSD` is what `state` or the step before gave; None begins a sequence.
        """
        self._check_width(x_BD, 2)
        x_BD = _as_autocast(x_BD)
        if state_BSD is None:
            dtype = torch.promote_types(x_BD.dtype, torch.float32)
            state_BSD = x_BD.new_zeros(len(x_BD), self.filterbank.state_size, x_BD.shape[1], dtype=dtype)
        y_BD, after_BSD = self.mixer.step(x_BD, state_BSD, self._context(k))
        assert isinstance(after_BSD, Tensor)
        return y_BD.to(x_BD.dtype), after_BSD

    @torch.no_grad()
    def truncate(self, k: int) -> SpectralLayer:
        """A smaller layer that computes what this one computes at budget k and below, from the same states."""
        self._context(k)
        chosen = {name: getattr(self.config, name) for name in SpectralChoices.__annotations__}
        chosen["sigma_scale"] = self.mixer.sigma_scale
        small = SpectralLayer(self.config.d_model, self.config.seq_len, k, **chosen)
        small.to(device=self.mixer.direct_DD.device, dtype=self.mixer.direct_DD.dtype).train(self.training)
        whole = dict(self.named_parameters())
        for name, parameter in small.named_parameters():
            parameter.copy_(whole[name][tuple(map(slice, parameter.shape))])
        small.filterbank.take(self.filterbank)
        return small

    def extra_repr(self) -> str:
        config = self.config
        return f"d_model={config.d_model}, seq_len={config.seq_len}, num_channels={config.num_channels}"

    def _context(self, k: int | None) -> Context:
        most = self.config.num_channels
        k = most if k is None else k
        if not 1 <= k <= most:
            raise UserError(f"budget k = {k}: must be between 1 and this layer's num_channels = {most}")
        return Context(k, self.filterbank, None)

    def _check_width(self, x: Tensor, dimensions: int) -> None:
        if x.dim() != dimensions or x.shape[-1] != self.config.d_model:
            axes = "(batch, length, d_model)" if dimensions == 3 else "(batch, d_model)"
            raise UserError(f"x is {tuple(x.shape)}: must be {axes} with d_model = {self.config.d_model}")


def _as_autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype, where that is on, so that the filter bank's products are made in it as on any input."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _checked(d_model: int, seq_len: int, num_channels: int, choices: SpectralChoices) -> ModelConfig:
    """The choices as a model's section, by whose types and bounds they are checked; the model's own knobs are 1."""
    values: dict[str, Any] = {"d_model": d_model, "seq_len": seq_len, "num_channels": num_channels, **choices}
    try:
        config = ModelConfig.model_validate({"vocab_size": 1, "n_layers": 1, "d_ffn": 1, **values})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, each['loc']))} = {each['input']!r}: {each['msg']}" for each in error.errors())
        raise UserError(f"SpectralLayer: {'; '.join(problems)}") from None
    if d_model % config.mixer_heads:
        raise UserError(f"SpectralLayer: d_model = {d_model}: must be divisible by mixer_heads = {config.mixer_heads}")
    return config
