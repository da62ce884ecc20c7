"""What Hugging Face's transformers needs to open an exported model. Nothing else of the package imports it."""

from megassm.hf.cache import MegaSSMCache
from megassm.hf.config import MegaSSMConfig
from megassm.hf.heads import MegaSSMForCausalLM, MegaSSMForSequenceClassification
from megassm.hf.model import MegaSSMModel
from megassm.hf.register import register
from megassm.hf.tokenizer import MegaSSMTokenizer

__all__ = [
    "MegaSSMCache",
    "MegaSSMConfig",
    "MegaSSMForCausalLM",
    "MegaSSMForSequenceClassification",
    "MegaSSMModel",
    "MegaSSMTokenizer",
]

register()
