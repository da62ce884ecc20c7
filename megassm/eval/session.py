"""A trained model opened in one process: its newest checkpoint, its data, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from megassm.checkpoint import Checkpoint, find_checkpoint
from megassm.config import Config
from megassm.data.dataset import Dataset, open_dataset
from megassm.data.tokenizer import Tokenizer
from megassm.errors import UserError
from megassm.model import LanguageModel


@dataclass(frozen=True)
class Session:
    """What tools that look at a trained model need."""

    checkpoint: Checkpoint
    config: Config
    data: Dataset
    device: torch.device

    @cached_property
    def model(self) -> LanguageModel:
        return self.checkpoint.load_model().to(self.device)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer


def open_session(path: Path, device: Literal["auto", "cpu", "cuda"]) -> Session:
    """Opens the newest complete checkpoint of a run, or the one named.

    Raises:
        UserError: no checkpoint, no data, another tokenizer, no such device.
    """
    checkpoint = find_checkpoint(path)
    config = checkpoint.config
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return Session(checkpoint, config, open_dataset(config), torch.device(name))
