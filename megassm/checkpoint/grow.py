"""A model that was opened at a small budget reads the rest of itself while it is used."""

from __future__ import annotations

import threading
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from megassm.checkpoint.format import StoredModel
from megassm.layers.block import Block
from megassm.layers.window import filter_bank
from megassm.model import LanguageModel

_ONE_AT_A_TIME = threading.Lock()


class Growing(NamedTuple):
    """A model's `megassm.model.Source`."""

    stored: StoredModel

    @torch.no_grad()
    def grow(self, model: LanguageModel, k: int) -> None:
        """See `LanguageModel.grow`. Whoever runs the model at the same time takes leading parts of either parameter,
        which are equal, and the filters that it began with."""
        with _ONE_AT_A_TIME:
            config = self.stored.model_config().cut(k).model_copy(update={"beyond": model.config.beyond})
            if k <= model.config.num_channels:
                return
            read = dict(self.stored.weights(k, dict(model.named_parameters())))
            bank = filter_bank(config)
            if bank is not None:
                bank.to(model.embedding_VD.device).reset()
            for name, values in read.items():
                _replace_parameter(model, name, values)
            for number, block in enumerate(cast(list[Block], model.blocks)):
                block.ffn.width = config.layer(number).ffn_width
            model.filterbank, model.config = bank, config  # the budget last: by then all is there


def _replace_parameter(model: nn.Module, name: str, values: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    module, old = model.get_submodule(owner), model.get_parameter(name)
    setattr(module, own, nn.Parameter(values.to(old), requires_grad=old.requires_grad))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
