"""The network with a head: a causal language model, and a classifier of texts.

Shapes: B batch, L length, D width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.utils.generic import can_return_tuple

from megassm.config.model import Budget
from megassm.hf.cache import CACHE, MegaSSMCache, cache_field
from megassm.hf.config import MegaSSMConfig
from megassm.hf.model import MegaSSMModel, MegaSSMPreTrainedModel
from megassm.ops.pooling import content_positions, pooled


class MegaSSMForCausalLM(MegaSSMPreTrainedModel, GenerationMixin):
    """The model at its full K, or with `k=` at any budget below."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MegaSSMConfig) -> None:
        super().__init__(config)
        self.model = MegaSSMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegaSSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        k: Budget | None = None,
        cache: MegaSSMCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V), or of the positions to keep; arguments as in `MegaSSMModel.forward`, and:

        Args:
            labels: (B, L) like input_ids, shifted here; -100 does not count, nor does what follows padding.
            logits_to_keep: last positions to return, 0 is all; or their numbers.
            kwargs: what `MegaSSMModel.forward` takes besides, and the loss (`num_items_in_batch`).
        """
        cache = past_key_values if cache is None else cache
        if cache is not None and isinstance(logits_to_keep, int):
            cache.ahead = logits_to_keep
        given = {"use_cache": use_cache, "k": k, **kwargs, "return_dict": True}
        read = self.model(input_ids, attention_mask, position_ids, cache, inputs_embeds, **given)
        x_BLD = cast(Tensor, read.last_hidden_state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BLV = self.lm_head(x_BLD[:, kept])
        loss = None
        if labels is not None:
            if attention_mask is not None and attention_mask.shape == labels.shape:
                follows_padding_BL = F.pad(attention_mask[:, :-1] == 0, (1, 0))
                labels = labels.masked_fill(follows_padding_BL, -100)
            loss = self.loss_function(logits=logits_BLV, labels=labels, vocab_size=logits_BLV.shape[-1], **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BLV, **_passed_on(read))

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """An empty cache where the caller has given none, so that it can be told to record."""
        prepared = cast(Any, super())._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = MegaSSMCache()
            if getattr(generation_config, "is_assistant", False):
                model_kwargs[CACHE].activate_past_recording()
        return prepared


class MegaSSMForSequenceClassification(MegaSSMPreTrainedModel):
    """A class a text: of a model trained on classes by the mean over the text's positions, else by its last token."""

    def __init__(self, config: MegaSSMConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = MegaSSMModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MegaSSMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Logits (B, C); labels are (B,), other arguments as in `MegaSSMModel.forward`. Of a model trained on classes
        input_ids may end in the separator and more."""
        given = {**kwargs, "return_dict": True}
        read = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **given)
        x_BLD = cast(Tensor, read.last_hidden_state)
        logits_BC = self.score(self._text(x_BLD, input_ids, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BC, labels=labels, pooled_logits=logits_BC, config=self.config)
        return SequenceClassifierOutputWithPast(loss=loss, logits=logits_BC, **_passed_on(read))

    def _text(self, x_BLD: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """What stands for each text, (B, D)."""
        batch, length = x_BLD.shape[:2]
        classes, pad = self.model.shape.classes, self.config.pad_token_id
        real_BL = torch.ones(batch, length, dtype=torch.bool, device=x_BLD.device)
        if attention_mask is not None:
            real_BL = attention_mask[:, -length:].bool()
        elif input_ids is not None and pad is not None:
            real_BL = input_ids != pad
        if classes is not None:
            if input_ids is not None:
                real_BL = real_BL & content_positions(input_ids, classes)
            return pooled(x_BLD, real_BL)[:, 0]
        places_L = torch.arange(length, device=x_BLD.device)
        return x_BLD[torch.arange(batch, device=x_BLD.device), (places_L * real_BL).argmax(1)]


def _passed_on(read: BaseModelOutputWithPast) -> dict[str, Any]:
    """What of the network's output a head returns as it is."""
    return {
        "hidden_states": read.hidden_states,
        "attentions": read.attentions,
        **cache_field(getattr(read, CACHE)),
    }
