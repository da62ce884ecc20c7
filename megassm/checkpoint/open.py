"""A trained model by its path alone, whatever is there: a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

import os
from pathlib import Path

from megassm.checkpoint.exported import is_model_folder, open_model_folder
from megassm.checkpoint.format import StoredModel, find_checkpoint, load_model
from megassm.data.dataset import run_tokenizer
from megassm.data.tokenizer.base import Tokenizer
from megassm.model import LanguageModel


def open_model(path: str | os.PathLike[str], k: int | None = None) -> LanguageModel:
    """A trained model, float32, on the CPU, in evaluation mode.

    Args:
        path: a run directory (its newest complete checkpoint counts), one of its checkpoints/step-*, or an exported
            folder. Data is not needed.
        k: read the leading part that budget `k` needs, and no more: the model is then as if cut by `truncate`, but
            its filters are derived for k channels, which differs by rounding. None: all channels.

    Raises:
        UserError: nothing there to open, a damaged file, or a budget out of range.
    """
    folder = Path(path)
    source: StoredModel = open_model_folder(folder) if is_model_folder(folder) else find_checkpoint(folder)
    return load_model(source, k)


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
