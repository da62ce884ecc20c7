"""Copied into every exported model: where transformers finds its classes. Needs MegaSSM, installed from a checkout
with the extra `hf`.

The code is not here because it is one with the training code: the filters of a model are derived when it is opened,
by the same few modules that derived them for training.
"""

from megassm.hf import (
    MegaSSMConfig,
    MegaSSMForCausalLM,
    MegaSSMForSequenceClassification,
    MegaSSMModel,
    MegaSSMTokenizer,
)

__all__ = [
    "MegaSSMConfig",
    "MegaSSMForCausalLM",
    "MegaSSMForSequenceClassification",
    "MegaSSMModel",
    "MegaSSMTokenizer",
]
