"""transformers' own tests of a model, run on ours (`tests.hub_mixins` says where they come from)."""

from __future__ import annotations

import importlib
import tempfile
import unittest
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import tests
from megassm.config.model import ModelConfig
from megassm.layers.state import LayerState, TapsState
from tests import hub_mixins

pytest.importorskip("transformers", reason="needs the extra 'hf'")
pytest.importorskip("parameterized", reason="transformers' tests need it")

from megassm.hf import (
    MegaSSMCache,
    MegaSSMConfig,
    MegaSSMForCausalLM,
    MegaSSMForSequenceClassification,
    MegaSSMModel,
    MegaSSMTokenizer,
)
from megassm.hf.register import register_models

FOLDER = hub_mixins.find()
if FOLDER is None:
    pytest.skip("python -m tests.hub_mixins fetches transformers' tests, online", allow_module_level=True)
tests.__path__.append(str(FOLDER))  # they import each other as modules of `tests`

pytestmark = pytest.mark.filterwarnings("ignore")


def part(name: str) -> ModuleType:
    return importlib.import_module(f"tests.{name}")


common, configuration, generation, training, tokenization = map(
    part,
    (
        "test_modeling_common",
        "test_configuration_common",
        "generation.test_utils",
        "test_training_mixin",
        "test_tokenization_common",
    ),
)
heads = part("causal_lm_tester") if (FOLDER / "causal_lm_tester.py").exists() else None
"""Of a checkout only."""
register_models()  # the mixins ask by name which class has which head


class Tester:
    """Makes small models and their inputs, of which every second text is padded on the left."""

    base_model_class, causal_lm_class = MegaSSMModel, MegaSSMForCausalLM
    sequence_classification_class = MegaSSMForSequenceClassification
    batch_size, seq_length, is_training = 13, 7, True
    hidden_size, num_hidden_layers, vocab_size, num_attention_heads, num_labels = 32, 2, 99, 4, 3
    type_sequence_label_size = 2

    def __init__(self, parent: unittest.TestCase, **knobs: Any) -> None:
        self.parent = parent
        self.model = ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            n_layers=self.num_hidden_layers,
            seq_len=64,
            num_channels=6,
            d_ffn=37,
            n_heads=self.num_attention_heads,
            **knobs,
        )

    def get_config(self) -> MegaSSMConfig:
        ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": self.num_labels}
        return MegaSSMConfig(megassm={"model": self.model.model_dump(mode="json")}, **ids)

    def prepare_config_and_inputs_for_common(self) -> tuple[MegaSSMConfig, dict[str, Tensor]]:
        ids_BL = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        ids_BL[ids_BL < 3] = 3  # special ids, of which tests and `generate` make padding: inside a text it is refused
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1::2, :3] = 0
        return self.get_config(), {"input_ids": ids_BL, "attention_mask": mask_BL}

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["input_ids"], None, inputs["attention_mask"], None, None, None


class ModelTests(
    common.ModelTesterMixin,  # type: ignore[misc, name-defined]
    generation.GenerationTesterMixin,  # type: ignore[misc, name-defined]
    training.TrainingTesterMixin,  # type: ignore[misc, name-defined]
):
    """What all models of ours are asked."""

    all_model_classes = (MegaSSMModel, MegaSSMForCausalLM, MegaSSMForSequenceClassification)
    test_can_init_all_missing_weights_before_2023 = True  # which a file without a year is taken for
    training_overfit_steps, training_overfit_learning_rate = 100, 1e-2
    model_tester = None
    knobs: dict[str, Any] = {}  # noqa: RUF012

    def setUp(self) -> None:
        self.model_tester = Tester(self, **self.knobs)
        sizes = {"hidden_size": 32, "num_attention_heads": 4}
        self.config_tester = configuration.ConfigTester(self, config_class=MegaSSMConfig, **sizes)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def _check_caches_are_equal(self, one: MegaSSMCache, other: MegaSSMCache) -> None:
        """The mixin wants this of a cache that is not transformers' own."""
        assert one.state is not None
        assert other.state is not None
        assert one.state.lengths == other.state.lengths
        for mine, theirs in zip(one.state.layers, other.state.layers, strict=True):
            torch.testing.assert_close(tensors(mine), tensors(theirs))


if heads is not None:
    Tester.create_and_check_model = heads.CausalLMModelTester.create_and_check_model
    for name in (
        "test_model",
        "test_sequence_classification_model",
        "test_sequence_classification_model_for_single_label",
        "test_sequence_classification_model_for_multi_label",
        "test_causal_lm_can_accept_training_kwargs",
    ):
        setattr(ModelTests, name, getattr(heads.CausalLMModelTest, name))


def tensors(layer: LayerState) -> list[Tensor]:
    if isinstance(layer, Tensor):
        return [layer]
    if isinstance(layer, TapsState):
        return [layer.past_BTD, *tensors(layer.mixer)]
    span = slice(max(layer.used))
    return [layer.buffers.key_BGTP[:, :, span], layer.buffers.value_BGTP[:, :, span]]


class PureTest(ModelTests, unittest.TestCase):
    """Spectral layers alone, one head: the paper's."""

    has_attentions = False


class HybridTest(ModelTests, unittest.TestCase):
    """Attention in every second layer; heads and taps in the others."""

    knobs = {"pattern": "SA", "n_kv_heads": 2, "mixer_heads": 4, "input_taps": 3}  # noqa: RUF012

    def test_attention_outputs(self) -> None:
        """The mixin wants weights of every layer; spectral layers have none."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).eval()
            with torch.no_grad():
                shown = model(**inputs, output_attentions=True, output_hidden_states=True, return_dict=True)
                (weights,) = shown.attentions
                assert weights.shape == (13, 4, 7, 7)
                assert torch.allclose(weights.sum(-1), torch.ones(()))
                assert not weights.triu(1).any()
                assert not weights[1, :, 3:, :3].any()  # padding
                model.set_attn_implementation("eager")
                eager = model(**inputs)
            assert torch.allclose(eager[0], shown[0], atol=1e-5)
            assert eager.attentions is None


class TokenizerTest(tokenization.TokenizerTesterMixin, unittest.TestCase):  # type: ignore[misc, name-defined]
    """The tokenizer of bytes."""

    tokenizer_class = MegaSSMTokenizer
    from_pretrained_id = ()
    test_tokenizer_from_extractor = False

    @classmethod
    def setUpClass(cls) -> None:
        cls.tokenizers_list: list[Any] = []
        cls.tmpdirname = tempfile.mkdtemp()
        MegaSSMTokenizer().save_pretrained(cls.tmpdirname)
