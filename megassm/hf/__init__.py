"""What Hugging Face's transformers needs to open an exported model. Nothing else of the package imports it."""

from megassm.hf.model import MegaSSMCache, MegaSSMConfig, MegaSSMForCausalLM
from megassm.hf.tokenizer import MegaSSMTokenizer

__all__ = ["MegaSSMCache", "MegaSSMConfig", "MegaSSMForCausalLM", "MegaSSMTokenizer"]
