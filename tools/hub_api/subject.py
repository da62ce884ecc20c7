"""The models that are checked, small and with random weights; the same checks run on each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megassm.checkpoint.exported import write_model_folder
from megassm.config.model import ModelConfig
from megassm.data.tokenizer.base import load_tokenizer
from megassm.hf import MegaSSMTokenizer
from megassm.model import build_model

OURS: dict[str, dict[str, Any]] = {
    "pure": {},
    "hybrid": {"pattern": "SA", "window": 20, "mixer_heads": 4, "gate": "sigmoid", "input_taps": 3},
}
KINDS = ("Llama", *OURS)
VOCABULARY, WIDTH, LAYERS, LENGTH = 300, 64, 4, 128
END = 256
TEXTS = ["def f(x):", "a", "The quick brown fox"]

Check = Callable[["Subject"], None]
CHECKS: dict[str, Check] = {}
"""By what is done, in the order of the table."""


def check(what: str) -> Callable[[Check], Check]:
    """Enters a function in the list."""

    def enter(function: Check) -> Check:
        assert what not in CHECKS
        CHECKS[what] = function
        return function

    return enter


class Subject:
    """A folder with a model of 0.2M parameters, and what is asked of it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.folder = self.new_folder()
        self.tokenizer: Any = MegaSSMTokenizer()
        self.ids = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(1))
        if kind == "Llama":
            _write_llama(self.folder)
        else:
            sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": LAYERS, "seq_len": LENGTH}
            ours = build_model(ModelConfig(**sizes, num_channels=6, d_ffn=128, n_heads=4, **OURS[kind]), 0)
            write_model_folder(self.folder, ours, load_tokenizer("bytes"), torch.float32)

    def new_folder(self) -> Path:
        return Path(tempfile.mkdtemp())

    def load(self, auto: str = "AutoModelForCausalLM", folder: Path | None = None, **options: Any) -> Any:
        """A model of its own, in evaluation mode; it generates as many tokens as it is asked for."""
        import transformers

        model: Any = getattr(transformers, auto).from_pretrained(folder or self.folder, **options)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = END
        return model.eval()

    def new(self, **changes: Any) -> Any:
        """One with new weights, its configuration changed."""
        from transformers import AutoConfig, AutoModelForCausalLM

        auto: Any = AutoModelForCausalLM
        return auto.from_config(AutoConfig.from_pretrained(self.folder, **changes))

    @cached_property
    def model(self) -> Any:
        """One that no check changes."""
        return self.load()

    def padded(self, side: str) -> Any:
        """Texts of three lengths."""
        return self.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)

    def logits(self, model: Any = None, ids: Tensor | None = None, **options: Any) -> Tensor:
        with torch.no_grad():
            model = self.model if model is None else model
            found: Tensor = model(self.ids if ids is None else ids, **options).logits
        return found

    def greedy(self, model: Any = None, ids: Tensor | None = None, tokens: int = 8, **options: Any) -> Any:
        model = self.model if model is None else model
        return model.generate(
            self.ids if ids is None else ids, max_new_tokens=tokens, **{"do_sample": False, **options}
        )


def same(one: Any, other: Any) -> None:
    assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, f"{one} is not {other}"


def near(one: Tensor, other: Tensor, limit: float = 1e-5) -> None:
    assert one.shape == other.shape, f"{tuple(one.shape)} is not {tuple(other.shape)}"
    apart = float((one.detach().float() - other.detach().float()).abs().max())
    assert apart <= limit, f"{apart:.2g} apart, more than {limit:g}"


def _write_llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
        bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
