"""What Hugging Face's transformers needs to open an exported model. Nothing else of the package imports it.

The names are imported when they are first used, so that transformers can be told of a configuration while it is itself
being imported (`megassm.hf.register`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megassm.hf.cache import MegaSSMCache
    from megassm.hf.config import MegaSSMConfig
    from megassm.hf.heads import MegaSSMForCausalLM, MegaSSMForSequenceClassification
    from megassm.hf.model import MegaSSMModel
    from megassm.hf.tokenizer import MegaSSMTokenizer

__all__ = [
    "MegaSSMCache",
    "MegaSSMConfig",
    "MegaSSMForCausalLM",
    "MegaSSMForSequenceClassification",
    "MegaSSMModel",
    "MegaSSMTokenizer",
]

_PLACES = {
    "MegaSSMCache": "cache",
    "MegaSSMConfig": "config",
    "MegaSSMForCausalLM": "heads",
    "MegaSSMForSequenceClassification": "heads",
    "MegaSSMModel": "model",
    "MegaSSMTokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
