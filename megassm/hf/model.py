"""An exported model as a transformers causal language model; its cache is the decoding state of constant size.

Written against transformers 5.23, whose generation asks of a cache no more than what `MegaSSMCache` has.

Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from megassm.config.model import ModelConfig
from megassm.errors import UserError
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel, initial_weights


class MegaSSMConfig(PretrainedConfig):
    """`megassm` is the section that the package wrote; the names transformers knows are read from it."""

    model_type = "megassm"
    megassm: dict[str, Any] | None = None

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate((self.megassm or {})["model"])

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model.d_model

    @property
    def num_hidden_layers(self) -> int:
        return self.model.n_layers

    @property
    def num_attention_heads(self) -> int:
        return self.model.n_heads

    @property
    def max_position_embeddings(self) -> int:
        """The length trained at; longer texts are computed, by the filters' continuation."""
        return self.model.seq_len


class Group(NamedTuple):
    """Rows of a batch that have read equally many tokens."""

    rows: Tensor
    state: DecodingState


class MegaSSMCache:
    """What a batch needs to be continued: S x d numbers a spectral layer and row, whatever was read.

    Rows whose prompts differ in length are in groups of their own where there is attention, whose positions differ
    then; without attention all rows are one group.
    """

    is_compileable = False

    def __init__(self, groups: Sequence[Group], seen: int) -> None:
        self.groups = list(groups)
        self.seen = seen

    def get_seq_length(self) -> int:
        """Tokens read, padding included."""
        return self.seen

    @property
    def nbytes(self) -> int:
        return sum(group.state.nbytes for group in self.groups)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        groups = []
        for rows, state in self.groups:
            new_rows, chosen = (beam_idx[:, None] == rows).nonzero(as_tuple=True)
            if len(new_rows):
                groups.append(Group(new_rows, state.take(chosen)))
        self.groups = groups


class MegaSSMForCausalLM(PreTrainedModel, GenerationMixin):
    """The model at its full K, or with `k=` at any budget below.

    With a cache the logits are those of the last position only, (B, 1, V).
    """

    config_class = MegaSSMConfig
    base_model_prefix = ""
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: MegaSSMConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: MegaSSMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        k: int | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Padding must be on one side; to make or to continue a cache, on the left.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L), 1 at real tokens; with a cache (B, L of all), and not looked at again.
            past_key_values: what an earlier call returned.
            labels: (B, L) like input_ids, shifted here; -100 does not count, nor does what follows padding.
            use_cache: return a cache. None is no.
            logits_to_keep: last positions to return; 0 is all.
            k: the budget; None is the model's K.
            return_dict: ignored; always an output object.

        Raises:
            UserError: padding elsewhere, a budget out of range.
        """
        self._check_filters()
        k = k or self.model.config.num_channels
        if past_key_values is not None:
            logits_BV = self._step_through(input_ids, past_key_values, k)
            return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=cast(Any, past_key_values))
        if use_cache and labels is None:
            logits_BV, cache = self._read_prompts(input_ids, attention_mask, k)
            return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=cast(Any, cache))
        logits_BLV = self._whole_logits(input_ids, attention_mask, k)
        loss = None
        if labels is not None:
            targets_BL = labels[:, 1:]
            if attention_mask is not None:  # what follows padding was predicted from nothing
                targets_BL = targets_BL.masked_fill(attention_mask[:, :-1] == 0, -100)
            loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1).float(), targets_BL.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits_BLV[:, -logits_to_keep:])

    def _whole_logits(self, ids_BL: Tensor, mask_BL: Tensor | None, k: int) -> Tensor:
        """Logits (B, L, V); zeros at padding on the left."""
        groups = _equal_starts(ids_BL, mask_BL, left_only=False)
        if len(groups) == 1 and groups[0][1] == 0:
            whole_BLV: Tensor = self.model(ids_BL, k)
            return whole_BLV
        logits_BLV = torch.zeros(*ids_BL.shape, self.config.vocab_size, dtype=self.dtype, device=ids_BL.device)
        for rows, start in groups:
            part: Tensor = self.model(ids_BL[rows, start:], k)
            logits_BLV[rows, start:] = part.to(logits_BLV.dtype)
        return logits_BLV

    def _read_prompts(self, ids_BL: Tensor, mask_BL: Tensor | None, k: int) -> tuple[Tensor, MegaSSMCache]:
        """(logits (B, V) after the last position, the cache), each length of prompt by itself."""
        parts, groups = [], []
        for rows, start in _equal_starts(ids_BL, mask_BL, left_only=True):
            logits_NV, state = self.model.prefill(ids_BL[rows, start:], k)
            parts.append(logits_NV)
            groups.append(Group(rows, state))
        order = torch.cat([group.rows for group in groups]).argsort()
        if "A" not in self.model.config.mixers and len(groups) > 1:  # a state knows no position
            layers = [torch.cat(cast(Any, layer)) for layer in zip(*(state.layers for _, state in groups), strict=True)]
            state = DecodingState((ids_BL.shape[1],) * len(order), list(layers)).take(order)
            groups = [Group(torch.arange(len(ids_BL), device=ids_BL.device), state)]
        return torch.cat(parts)[order], MegaSSMCache(groups, ids_BL.shape[1])

    def _step_through(self, ids_BL: Tensor, cache: MegaSSMCache, k: int) -> Tensor:
        """Logits (B, V) after the last position, a step a position; the cache is replaced in place."""
        logits_BV = torch.empty(0)
        for ids_B in ids_BL.unbind(1):
            groups, parts = [], []
            for rows, state in cache.groups:
                logits_NV, after = self.model.step(ids_B[rows], state, k)
                groups.append(Group(rows, after))
                parts.append(logits_NV)
            cache.groups, cache.seen = groups, cache.seen + 1
            logits_BV = torch.cat(parts)[torch.cat([group.rows for group in groups]).argsort()]
        return logits_BV

    def _check_filters(self) -> None:
        """Derives the filters where they are not there yet."""
        bank = self.model.filterbank
        if bank is not None and bank.filters_LK.numel() == 0:
            bank.reset()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Parameters that came from no file start as in training."""
        missing = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if module is self.model and not getattr(parameter, "_is_hf_initialized", False)
        }
        if missing:
            for name, whole in initial_weights(self.model.config, seed=0):
                if name in missing:
                    missing[name].copy_(whole)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("the embedding is a parameter of the model, not a module of its own")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False


def _equal_starts(ids_BL: Tensor, mask_BL: Tensor | None, left_only: bool) -> list[tuple[Tensor, int]]:
    """(rows, their first real position), for each first position."""
    batch, length = ids_BL.shape
    if mask_BL is None:
        return [(torch.arange(batch, device=ids_BL.device), 0)]
    real_BL = mask_BL.bool()
    if real_BL.shape != ids_BL.shape:
        raise UserError(f"attention_mask is {tuple(real_BL.shape)}, input_ids {tuple(ids_BL.shape)}: must be equal")
    starts_B = real_BL.int().argmax(1)
    ends_B = length - real_BL.flip(1).int().argmax(1)
    if not torch.equal(real_BL.sum(1), ends_B - starts_B) or not real_BL.any(1).all():
        raise UserError("attention_mask has a row that is no text with padding around it; pad on one side")
    if left_only and bool((ends_B < length).any()):
        raise UserError("padding on the right: there is nothing to continue; use tokenizer.padding_side = 'left'")
    return [((starts_B == start).nonzero()[:, 0], int(start)) for start in starts_B.unique()]
