"""The configuration of a model under transformers: this package's section, and the names by which others ask for it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from megassm.checkpoint.exported import AUTO_MAP, SECTION, write_code
from megassm.config.model import ModelConfig

KNOBS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "initializer_range",
    "tie_word_embeddings",
    "max_position_embeddings",
)
"""The names of the section's knobs under transformers; where both are given, these count."""

when_made: list[Callable[[], None]] = []
"""Called whenever a configuration is made; the first time transformers is told of models (`megassm.hf.register`)."""

DEFAULT = ModelConfig(vocab_size=257, d_model=256, n_layers=4, seq_len=1024, num_channels=16, d_ffn=688)
"""What `MegaSSMConfig()` is: a small model of bytes."""


def _knob(name: str) -> property:
    """A knob of the section's model, under another name."""

    def read(config: MegaSSMConfig) -> Any:
        return getattr(config.model, name)

    def write(config: MegaSSMConfig, value: Any) -> None:
        section = config.section
        section["model"] = {**section["model"], name: value}

    return property(read, write)


class MegaSSMConfig(PretrainedConfig):
    """`megassm` is the section that the package wrote; the names transformers knows are read from it and set in it."""

    model_type = "megassm"
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    megassm: dict[str, Any] | None = None
    use_cache: bool = True
    k: int | list[int] | None = None
    """The budget where a call gives none, or one for each layer; None is the model's K."""
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    vocab_size = _knob("vocab_size")
    hidden_size = _knob("d_model")
    num_hidden_layers = _knob("n_layers")
    num_attention_heads = _knob("n_heads")
    intermediate_size = _knob("d_ffn")
    initializer_range = _knob("embed_init_std")
    tie_word_embeddings = _knob("tie_embeddings")
    max_position_embeddings = _knob("seq_len")
    """The length trained at; longer texts are computed, by the filters' continuation."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.megassm = copy.deepcopy(self.megassm) or {"model": DEFAULT.model_dump(mode="json")}
        kwargs.pop("auto_map", None)  # that of a hub names the repository it came from
        if self.model.classes is not None and getattr(self, "id2label", None) is None:
            kwargs["num_labels"] = self.model.classes
        super().__post_init__(**kwargs)
        for action in when_made:
            action()
        self.auto_map = dict(AUTO_MAP)

    @property
    def section(self) -> dict[str, Any]:
        """This package's part of config.json; its "model" is what `ModelConfig` is made of."""
        assert self.megassm is not None
        return self.megassm

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(self.section["model"])

    @property
    def head_dim(self) -> int:
        """Of an attention layer."""
        return self.model.d_model // self.model.n_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.model.kv_heads

    @num_key_value_heads.setter
    def num_key_value_heads(self, value: int) -> None:
        if value != self.num_key_value_heads:  # None in the section follows num_attention_heads
            self.section["model"] = {**self.section["model"], "n_kv_heads": value}

    def to_dict(self) -> dict[str, Any]:
        """With the knobs by transformers' names too, where other tools look for them."""
        return {**super().to_dict(), **{name: getattr(self, name) for name in KNOBS}}

    def to_diff_dict(self) -> dict[str, Any]:
        """With the whole section, whatever of it is the default."""
        return {**super().to_diff_dict(), SECTION: copy.deepcopy(self.megassm)}

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Also writes the file that `auto_map` names."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_code(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: a saved model imports the package, and needs no copy of its code."""
