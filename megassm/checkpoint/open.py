"""A trained model by its path alone, whatever is there: a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

import os
from pathlib import Path

from megassm.checkpoint.exported import ModelFolder, is_model_folder, open_model_folder
from megassm.checkpoint.format import StoredModel, find_checkpoint, load_model
from megassm.data.dataset import run_tokenizer
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.model import LanguageModel


def open_model(path: str | os.PathLike[str], k: int | None = None, averaged: bool = False) -> LanguageModel:
    """A trained model, float32, on the CPU, in evaluation mode.

    Args:
        path: a run directory (its newest complete checkpoint counts), one of its checkpoints/step-*, or an exported
            folder. Data is not needed.
        k: read the leading part that budget `k` needs, and no more: the model is then as if cut by `truncate`, but
            its filters are derived for k channels, which differs by rounding. None: all channels.
        averaged: the running average of a run's weights (optim.ema) for the weights.

    Raises:
        UserError: nothing there to open, a damaged file, a budget out of range, or no average.
    """
    folder = Path(path)
    source: StoredModel
    source = stored_model_folder(folder, averaged) if is_model_folder(folder) else find_checkpoint(folder, averaged)
    return load_model(source, k)


def stored_model_folder(path: Path, averaged: bool = False) -> ModelFolder:
    """An exported model.

    Raises:
        UserError: it is none, or `averaged` is asked for: it has one set of weights.
    """
    if averaged:
        raise UserError(f"{path}: an exported model has no running average beside its weights; leave out --ema")
    return open_model_folder(path)


def open_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a trained model: its exported folder's own, or what its run directory kept.

    Raises:
        UserError: nothing there to open; of an older run, its data set is gone.
    """
    folder = Path(path)
    if is_model_folder(folder):
        return open_model_folder(folder).tokenizer()
    checkpoint = find_checkpoint(folder)
    return run_tokenizer(checkpoint.config, checkpoint.kept_tokenizer)
