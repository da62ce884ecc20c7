"""The names and forms of parameters: those of `megassm.model`, in files, and those of the linear layers here.

A file is the same whoever wrote it, training's export or `save_pretrained`: transformers renames and lays out anew
what it reads, and does the reverse with what it writes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

from megassm.checkpoint.exported import HEAD, PREFIX, SCORE
from megassm.config.model import ModelConfig
from megassm.hf.layers import stacked, unstacked

RENAMED = {
    "embedding_VD": "embed_tokens.weight",
    "mixer.gate.score_KH": "mixer.gate.score.weight",
    "mixer.gate.score_bias_K": "mixer.gate.score.bias",
}
TRANSPOSED = {"mixer.direct_DD": "mixer.direct_proj.weight", "mixer.out_DD": "mixer.out_proj.weight"}
CHANNELS = ("mixer.channels_KDD", "mixer.channels.weight")
CAUSAL, CLASSIFIER = "MegaSSMForCausalLM", "MegaSSMForSequenceClassification"
HEADS = {CAUSAL: "lm_head.weight", CLASSIFIER: SCORE}
"""What a model's own head is called, by class."""
IN_FILE = f"{PREFIX}{HEAD}"
"""What that of a vocabulary is called in files."""


def hub_form(name: str, value: Tensor, config: ModelConfig) -> tuple[str, Tensor]:
    """(the name here, without the prefix of the base model; the values as they are kept here)."""
    for ours, theirs in RENAMED.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs, value
    for ours, theirs in TRANSPOSED.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs, value.t().contiguous()
    if name.endswith(CHANNELS[0]):
        return name.removesuffix(CHANNELS[0]) + CHANNELS[1], unstacked(value, config.mixer_heads).contiguous()
    return name, value


def take_file_form(module: Any, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    """Before `load_state_dict`: the Trainer, which resumes by it, hands it a file's tensors as they are."""
    config = module.config.model
    head = HEADS[CAUSAL] if type(module).__name__ == CAUSAL else None
    for name in [name for name in state_dict if name.startswith(prefix)]:
        value = state_dict.pop(name)
        if name == prefix + IN_FILE and head is not None:
            state_dict[prefix + head] = value
        else:
            hub_name, hub_value = hub_form(name, value, config)
            state_dict[hub_name] = hub_value
    embedding = state_dict.get(f"{prefix}model.embed_tokens.weight")
    if head is not None and config.tie_embeddings and embedding is not None:
        state_dict.setdefault(prefix + head, embedding)


class _Form(ConversionOps):
    """One parameter in the other form; `opens` says in which direction."""

    def __init__(self, opens: bool) -> None:
        self.opens = opens

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        value = tensors[0] if isinstance(tensors, list) else tensors
        heads = kwargs["config"].model.mixer_heads
        return {kwargs["full_layer_name"]: self._of(value, heads).detach()}

    def _of(self, value: Tensor, heads: int) -> Tensor:
        raise NotImplementedError

    @property
    def reverse_op(self) -> ConversionOps:
        return type(self)(not self.opens)


class Transposed(_Form):
    """A matrix that is multiplied from the right as the weight of a linear layer, and back."""

    def _of(self, value: Tensor, heads: int) -> Tensor:
        return value.t().contiguous()


class Stacked(_Form):
    """The channel matrices as one linear layer, and back."""

    def _of(self, value: Tensor, heads: int) -> Tensor:
        return (unstacked if self.opens else stacked)(value, heads).contiguous()


def _transforms(head: str | None = None) -> list[WeightConverter | WeightRenaming]:
    transforms: list[WeightConverter | WeightRenaming] = [
        WeightRenaming(ours, theirs) for ours, theirs in RENAMED.items()
    ]
    if head is not None:
        transforms.append(WeightRenaming(f"^{IN_FILE}", f"^{head}"))
    # one for both, because a model of one head has one of them only: every pattern is to be found in every model
    transforms.append(WeightConverter(r"mixer.\1_DD", "mixer.(direct|out)_proj.weight", [Transposed(True)]))
    return [*transforms, WeightConverter(CHANNELS[0], CHANNELS[1], [Stacked(True)])]


def register_conversions() -> None:
    for name, transforms in (("megassm", _transforms()), (CAUSAL, _transforms(HEADS[CAUSAL]))):
        register_checkpoint_conversion_mapping(name, transforms, overwrite=True)
