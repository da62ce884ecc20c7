"""Tells transformers of this package's classes, so that `model_type: megassm` needs no trust_remote_code.

`import megassm` has `register_config` and `register_tokenizer` called once transformers' own tables exist. Those of
models follow with the first configuration that is made (`register_models_later`): sooner, transformers may be in the
middle of its own imports.
"""

from __future__ import annotations

from functools import cache

MODEL_TYPE = "megassm"


@cache
def register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from megassm.hf.config import MegaSSMConfig

    AutoConfig.register(MODEL_TYPE, MegaSSMConfig, exist_ok=True)


@cache
def register_tokenizer() -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from megassm.hf.config import MegaSSMConfig
    from megassm.hf.tokenizer import MegaSSMTokenizer

    AutoTokenizer.register(MegaSSMConfig, slow_tokenizer_class=MegaSSMTokenizer, exist_ok=True)


@cache
def register_models_later() -> None:
    from megassm.hf.config import when_made

    when_made.append(register_models)


@cache
def register_models() -> None:
    """Classes by configuration; and by name, where pipelines and the Trainer's label smoothing look for them."""
    from transformers.models.auto import modeling_auto

    from megassm.hf.config import MegaSSMConfig
    from megassm.hf.heads import MegaSSMForCausalLM, MegaSSMForSequenceClassification
    from megassm.hf.model import MegaSSMModel
    from megassm.hf.weights import register_conversions

    register_conversions()
    for auto_class, names, model_class in (
        (modeling_auto.AutoModel, modeling_auto.MODEL_MAPPING_NAMES, MegaSSMModel),
        (
            modeling_auto.AutoModelForCausalLM,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MegaSSMForCausalLM,
        ),
        (
            modeling_auto.AutoModelForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            MegaSSMForSequenceClassification,
        ),
    ):
        auto_class.register(MegaSSMConfig, model_class, exist_ok=True)
        names[MODEL_TYPE] = model_class.__name__
