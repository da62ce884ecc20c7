"""A trained model by its path alone, whatever is there: a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

import os
from pathlib import Path

from megassm.checkpoint.exported import ModelFolder, is_model_folder, open_model_folder
from megassm.checkpoint.format import StoredModel, find_checkpoint, load_model
from megassm.checkpoint.grow import Growing
from megassm.checkpoint.remote import open_remote
from megassm.data.dataset import run_tokenizer
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError, scheme_of
from megassm.model import LanguageModel


def open_model(path: str | os.PathLike[str], k: int | None = None, averaged: bool = False) -> LanguageModel:
    """A trained model, float32, on the CPU, in evaluation mode.

    Args:
        path: a run directory (its newest complete checkpoint counts), one of its checkpoints/step-*, or an exported
            folder; or the URL of one, of any scheme that data is read from. Data is not needed.
        k: read the leading part that budget `k` needs, and no more: the model is then as if cut by `truncate`, but
            its filters are derived for k channels, which differs by rounding. `LanguageModel.grow` reads the rest.
            None: all channels.
        averaged: the running average of a run's weights (optim.ema) for the weights.

    Raises:
        UserError: nothing there to open, a damaged file, a budget out of range, or no average.
    """
    stored = _source(path, averaged)
    model = load_model(stored, k)
    if model.config != stored.model_config():
        model.source = Growing(stored)
    return model


def _source(path: str | os.PathLike[str], averaged: bool) -> StoredModel:
    if is_url(path):
        return open_remote(str(path), averaged)
    folder = Path(path)
    return stored_model_folder(folder, averaged) if is_model_folder(folder) else find_checkpoint(folder, averaged)


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether it names a place that is reached through the data plane."""
    return isinstance(path, str) and scheme_of(path) != ""


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
    if is_url(path):
        return open_remote(str(path)).tokenizer()
    folder = Path(path)
    if is_model_folder(folder):
        return open_model_folder(folder).tokenizer()
    checkpoint = find_checkpoint(folder)
    return run_tokenizer(checkpoint.config, checkpoint.kept_tokenizer)
