"""The network without a head, as transformers expects one. Written against transformers 5.23 and 5.24.

Shapes: B batch, L length, T length with what a cache has read, D width.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from megassm.checkpoint.exported import is_model_folder, open_model_folder, write_code
from megassm.config.model import Budget
from megassm.cost import parameters
from megassm.errors import UserError
from megassm.hf.cache import MegaSSMCache, cache_field, padding_mask
from megassm.hf.config import MegaSSMConfig
from megassm.hf.layers import HubBlock, joined
from megassm.hf.weights import HEADS, hub_form, take_file_form
from megassm.layers.attention import attention_mask as attention_bias
from megassm.layers.attention import rope_tables
from megassm.layers.context import Context
from megassm.layers.filterbank import FilterBank
from megassm.layers.state import DecodingState, LayerState
from megassm.layers.window import filter_bank
from megassm.model import initial_weights
from megassm.ops.kernel_check import is_exporting

LEAST_BYTES = 1 / 16
"""Of a parameter in a file, far less than any quantized one has."""
SMALL_MODEL = 16_000_000
"""Parameters up to which any file will do: transformers fills what it lacks, and says so."""


class MegaSSMPreTrainedModel(PreTrainedModel):
    """Loading, saving and starting weights."""

    config_class = MegaSSMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["HubBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"head_VD$"]  # noqa: RUF012

    def __init__(self, config: MegaSSMConfig) -> None:
        super().__init__(config)
        self.register_load_state_dict_pre_hook(take_file_form)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parameters that came from no file start as in training; what is new to a model, as its embedding does."""
        if isinstance(module, FilterBank):
            module.reset()
        elif isinstance(module, MegaSSMPreTrainedModel):
            module._start()
        elif (isinstance(module, nn.Embedding) or type(module) is nn.Linear) and not getattr(
            module.weight, "_is_hf_initialized", False
        ):
            module.weight.normal_(0.0, self.config.initializer_range)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Custom code or not: transformers passes over a custom model that has no parameter of its own."""
        super()._initialize_weights(module, is_custom_code=False)

    def _start(self) -> None:
        """Fills what is this module's own, not its base model's, and came from no file."""
        prefix = f"{self.base_model_prefix}."
        missing = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith(prefix) and not getattr(parameter, "_is_hf_initialized", False)
        }
        if not missing:
            return
        config = self.config.model
        for name, whole in initial_weights(config, seed=0):
            hub_name, value = hub_form(name, whole, config)
            hub_name = HEADS.get(type(self).__name__, hub_name) if name == "head_VD" else hub_name
            if hub_name in missing and missing[hub_name].shape == value.shape:
                missing[hub_name].copy_(value)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As transformers does; the classes are imported from the package, never copied."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        if Path(save_directory, "config.json").exists():
            write_code(Path(save_directory))
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As transformers does, where a folder's files are not far too small for the large model of its config."""
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if is_model_folder(folder):
            stored = open_model_folder(folder)
            if parameters(stored.config, stored.config.num_channels) > SMALL_MODEL:
                stored.check_size(LEAST_BYTES)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: a saved model imports the package, and needs no copy of its code."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


class MegaSSMModel(MegaSSMPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config: MegaSSMConfig) -> None:
        super().__init__(config)
        model = config.model
        self.embed_tokens = nn.Embedding(model.vocab_size, model.d_model)
        self.blocks = nn.ModuleList(HubBlock(model.layer(n), scale) for n, scale in enumerate(model.sigma_scales))
        self.head_norm = nn.RMSNorm(model.d_model, eps=model.norm_eps)
        self.filterbank = filter_bank(model)
        self.shape = model
        """The network's sizes; the vocabulary's may have changed since."""
        self.gradient_checkpointing = False
        if self.filterbank is not None:
            self.filterbank.reset()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegaSSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        k: Budget | None = None,
        cache: MegaSSMCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The normed output of the last block.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 at real tokens, padding being on one side; with a cache also (B, T).
            position_ids: (B, L); a number that does not follow the one before begins another text, kept apart.
            past_key_values: what an earlier call returned, continued in place; named `cache` from transformers 5.24 on.
            inputs_embeds: (B, L, D), instead of input_ids.
            use_cache: return a cache. None is the configuration's choice, and no in training.
            output_hidden_states: return what each block reads, and the output; numbers are of those that are wanted.
            output_attentions: return the weights (B, H, L, T) of the attention layers, over the positions their window
                reaches; spectral layers have none.
            k: the budget, or one for each layer; None is `config.k`, or the model's K.
            kwargs: `return_dict=False` returns a tuple; others are not looked at.

        Raises:
            UserError: padding elsewhere, a budget out of range, a cache of another kind.
            ValueError: both of input_ids and inputs_embeds, or neither.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        base = self._base(k, output_attentions)
        states = self._states(x_BLD, attention_mask, position_ids, base, cache)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=cast(Any, states[-1]),
            hidden_states=cast(Any, _chosen(states, wanted)),
            attentions=cast(Any, joined(base.attentions, self.shape.mixers.count("A"))) if base.attentions else None,
            **cache_field(cache),
        )

    def _states(
        self,
        x_BLD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        base: Context,
        cache: MegaSSMCache | None,
    ) -> list[Tensor]:
        """What each block reads, and the output; a cache is continued, or filled."""
        before = 0 if cache is None else cache.get_seq_length()
        real_BL = padding_mask(attention_mask, x_BLD.shape[0], x_BLD.shape[1], before)
        if cache is not None and before:
            return self._continue(x_BLD, real_BL, base, cache)
        return self._read(x_BLD, real_BL, _documents(position_ids, real_BL, x_BLD.shape[0]), base, cache)

    def _base(self, k: Budget | None, output_attentions: bool | None) -> Context:
        """What of a context is the same for all parts of a call; weights that are formed but not shown are not kept."""
        shown = bool(self.config.output_attentions if output_attentions is None else output_attentions)
        by_weights = shown or self.config._attn_implementation == "eager"
        attentions: deque[Tensor] | None = (
            deque(maxlen=None if shown else 0) if by_weights and "A" in self.shape.mixers else None
        )
        return Context.at(self.budgets(k), self.filterbank)._replace(attentions=attentions)

    def _cache(self, cache: MegaSSMCache | None, use_cache: bool | None) -> MegaSSMCache | None:
        """What is to be continued and filled: a new one where a cache is wanted, none where an empty one is not."""
        if cache is None:
            return MegaSSMCache() if self._wants_cache(use_cache) else None
        if not isinstance(cache, MegaSSMCache):
            raise UserError(
                f"the cache is a {type(cache).__name__}, which has no place for a spectral state: give what an earlier "
                "call returned, or megassm.hf.MegaSSMCache(), or none"
            )
        return None if use_cache is False and cache.state is None else cache

    def budgets(self, k: Budget | None) -> tuple[int, ...]:
        """K of each layer; raises UserError for what this model has not."""
        return self.shape.layer_budgets(getattr(self.config, "k", None) if k is None else k)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if self.training and (use_cache is None or self.gradient_checkpointing):
            return False
        return bool(self.config.use_cache if use_cache is None else use_cache)

    def _read(
        self,
        x_BLD: Tensor,
        real_BL: Tensor | None,
        documents_BL: Tensor | None,
        base: Context,
        cache: MegaSSMCache | None,
    ) -> list[Tensor]:
        """What each block reads, and the output; a cache is filled."""
        length = x_BLD.shape[1]
        stepped = min(cache.ahead, length - 1) if cache is not None and cache.is_recording else 0
        if stepped:
            assert cache is not None
            cache.ahead = 0
            head, tail = slice(None, length - stepped), slice(length - stepped, None)
            first = self._read(x_BLD[:, head], None if real_BL is None else real_BL[:, head], documents_BL, base, cache)
            rest = self._continue(x_BLD[:, tail], None if real_BL is None else real_BL[:, tail], base, cache)
            return [torch.cat(parts, dim=1) for parts in zip(first, rest, strict=True)]
        context = self._context(0, length, self._apart(base, documents_BL), x_BLD, real_BL)
        states = [x_BLD]
        layers: list[LayerState] = []
        for number, block in enumerate(cast(list[HubBlock], self.blocks)):
            if cache is None:
                x_BLD = block(x_BLD, context.of(number))
            else:
                x_BLD, continued = block.extend(x_BLD, None, context.of(number))
                layers.append(continued.keep([length] * len(x_BLD)))
            states.append(x_BLD)
        if cache is not None:
            cache.read(real_BL, x_BLD.shape[0], length, x_BLD.device)
            cache.state = DecodingState((length,) * len(x_BLD), layers)
        states[-1] = self.head_norm(x_BLD)
        return states

    def _continue(self, x_BLD: Tensor, real_BL: Tensor | None, base: Context, cache: MegaSSMCache) -> list[Tensor]:
        """`_read` after what the cache has read; position by position where it is to know the states between."""
        if cache.real_BT is not None and not bool(cache.real_BT[:, -1].all()):
            raise UserError("padding on the right: there is nothing to continue; use tokenizer.padding_side = 'left'")
        length = 1 if cache.is_recording else x_BLD.shape[1]
        parts = []
        for first in range(0, x_BLD.shape[1], length):
            part = slice(first, first + length)
            parts.append(self._extend(x_BLD[:, part], None if real_BL is None else real_BL[:, part], base, cache))
        return [torch.cat(states, dim=1) for states in zip(*parts, strict=True)]

    def _extend(self, x_BLD: Tensor, real_BL: Tensor | None, base: Context, cache: MegaSSMCache) -> list[Tensor]:
        assert cache.state is not None
        batch, length = x_BLD.shape[:2]
        real_BT = cache.read(real_BL, batch, length, x_BLD.device)
        context = self._context(cache.get_seq_length(), length, base, x_BLD, real_BL)._replace(mask=None)
        if real_BT is not None and "A" in self.shape.mixers:
            bias_BT = torch.zeros(real_BT.shape, dtype=x_BLD.dtype, device=x_BLD.device)
            context = context._replace(mask=bias_BT.masked_fill_(~real_BT, -torch.inf)[:, None, None])
        states = [x_BLD]
        layers: list[LayerState] = []
        for number, block in enumerate(cast(list[HubBlock], self.blocks)):
            layer, own = cache.state.layers[number], context.of(number)
            if length == 1:
                x_BD, after = block.step(x_BLD[:, 0], layer, own)
                x_BLD = x_BD[:, None]
            else:
                x_BLD, continued = block.extend(x_BLD, layer, own)
                after = continued.keep([length] * batch)
            layers.append(after)
            states.append(x_BLD)
        cache.advance(DecodingState(tuple(seen + length for seen in cache.state.lengths), layers))
        states[-1] = self.head_norm(x_BLD)
        return states

    def _context(self, first: int, length: int, base: Context, like: Tensor, real_BL: Tensor | None) -> Context:
        real_BL1 = None if real_BL is None else real_BL[..., None]
        if "A" not in self.shape.mixers:
            return base._replace(real_BL1=real_BL1)
        if real_BL is None and is_exporting():  # one mask for lengths within a window and beyond
            real_BL = torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)
        positions_L = torch.arange(first, first + length, device=like.device)
        rope = rope_tables(positions_L, self.shape.d_model // self.shape.n_heads, self.shape.rope_theta)
        mask = attention_bias(length, self.shape.window, base.documents_BL, like, real_BL)
        return base._replace(rope=rope, mask=mask, real_BL1=real_BL1)

    def _apart(self, context: Context, documents_BL: Tensor | None) -> Context:
        """`context` with the documents, if any, kept apart."""
        if documents_BL is None:
            return context
        segments = None if self.filterbank is None else self.filterbank.segments(documents_BL)
        return context._replace(segments=segments, documents_BL=documents_BL)


def _chosen(states: Sequence[Tensor], wanted: bool | int | Sequence[int] | None) -> tuple[Tensor | None, ...] | None:
    """All states, or None in place of those whose number is not wanted; numbers below 0 count from the end."""
    if wanted is None or isinstance(wanted, bool):
        return tuple(states) if wanted else None
    numbers = {wanted} if isinstance(wanted, int) else set(wanted)
    return tuple(state if {i, i - len(states)} & numbers else None for i, state in enumerate(states))


def _documents(position_ids: Tensor | None, real_BL: Tensor | None, batch: int) -> Tensor | None:
    """The number of each position's text, where positions say that there are several; those of padding say nothing."""
    if position_ids is None or position_ids.dim() != 2:
        return None
    begins_BL = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if real_BL is not None:
        begins_BL = begins_BL & real_BL[:, 1:] & real_BL[:, :-1]
    if not bool(begins_BL.any()):
        return None
    return nn.functional.pad(begins_BL.long().cumsum(1), (1, 0)).expand(batch, -1)
