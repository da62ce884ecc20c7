"""Tells transformers of this package's classes, so that `model_type: megassm` needs no trust_remote_code."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megassm.hf.config import MegaSSMConfig
from megassm.hf.heads import MegaSSMForCausalLM, MegaSSMForSequenceClassification
from megassm.hf.model import MegaSSMModel
from megassm.hf.tokenizer import MegaSSMTokenizer
from megassm.hf.weights import register_conversions


def register() -> None:
    register_conversions()
    AutoConfig.register("megassm", MegaSSMConfig, exist_ok=True)
    AutoModel.register(MegaSSMConfig, MegaSSMModel, exist_ok=True)
    AutoModelForCausalLM.register(MegaSSMConfig, MegaSSMForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MegaSSMConfig, MegaSSMForSequenceClassification, exist_ok=True)
    AutoTokenizer.register(MegaSSMConfig, slow_tokenizer_class=MegaSSMTokenizer, exist_ok=True)
