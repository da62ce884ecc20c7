"""A trained model opened for evaluation in one process: its newest checkpoint, its data, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megassm.checkpoint.exported import is_model_folder
from megassm.checkpoint.format import Checkpoint, find_checkpoint, load_model
from megassm.checkpoint.open import is_url, open_model, open_tokenizer, stored_model_folder
from megassm.config.schema import Config
from megassm.data.dataset import Dataset, open_dataset, padded_token_bytes, run_tokenizer
from megassm.data.stream import MicroBatch, StreamPlan, validation_batches
from megassm.data.task import Task, TaskTokenizer
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError, without_secrets
from megassm.eval.text import EvalText, is_plain_text, open_texts
from megassm.model import LanguageModel

Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class Session:
    """What tools that look at a trained model need."""

    checkpoint: Checkpoint
    config: Config
    device: torch.device
    tokenizer: Tokenizer
    prepared: Dataset | UserError
    """The data; or why it cannot be opened, which is raised when it is asked for."""
    text: EvalText | None = None
    """What to validate on in place of it."""

    @cached_property
    def model(self) -> LanguageModel:
        return load_model(self.checkpoint).to(self.device)

    @property
    def run_dir(self) -> Path:
        """RUN_DIR of RUN_DIR/checkpoints/step-N."""
        return self.checkpoint.folder.parent.parent

    @property
    def data(self) -> Dataset:
        if isinstance(self.prepared, UserError):
            raise self.prepared
        return self.prepared

    @property
    def task(self) -> Task | None:
        """What its examples are, of a model of labelled data."""
        return self.tokenizer.task if isinstance(self.tokenizer, TaskTokenizer) else None

    @property
    def token_bytes(self) -> npt.NDArray[np.int64]:
        """(V,) UTF-8 bytes of text of every id the model knows."""
        return padded_token_bytes(self.tokenizer, self.config.model.vocab_size)

    @property
    def document_end(self) -> int | None:
        """The id that ends a document, where the model was trained to keep documents apart."""
        return self.tokenizer.eod if self.config.data.isolate_documents else None

    def validation(self, sequences: int, seq_len: int | None = None) -> list[MicroBatch]:
        """The first `sequences` validation sequences, of the trained length or of another."""
        plan = StreamPlan(
            seq_len=seq_len or self.config.model.seq_len,
            batch_sequences=self.config.train.micro_batch_sequences,
            micro_batch_sequences=self.config.train.micro_batch_sequences,
            seed=self.config.run.seed,
        )
        if self.text is not None:
            return list(self.text.read(plan, sequences))
        return list(validation_batches(self.data.valid, plan, sequences))


def open_session(path: Path, data_path: str | None, device: Device, averaged: bool = False) -> Session:
    """Opens the newest complete checkpoint of a run, or the one named, on its own data or on `data_path`: a prepared
    set, or plain text. A run whose own data is gone can be opened; what needs the data says so then. With `averaged`
    the model is the running average of the weights.

    Raises:
        UserError: no checkpoint, no tokenizer, another one, no such device.
    """
    checkpoint = find_checkpoint(path, averaged)
    config, kept = checkpoint.config, checkpoint.kept_tokenizer
    if data_path is not None and is_plain_text(data_path):
        [text], tokenizer = open_texts(config, [data_path], kept=kept)
        gone = UserError(f"--data {data_path}: is plain text; this needs a prepared data set")
        return Session(checkpoint, config, _device(device), tokenizer, gone, text)
    if data_path is not None:
        one_set = {"path": data_path, "sources": {}, "phases": ()}
        config = config.model_copy(update={"data": config.data.model_copy(update=one_set)})
    try:
        data = open_dataset(config)
    except UserError as error:
        if data_path is not None or not kept.is_dir():
            raise
        return Session(checkpoint, config, _device(device), run_tokenizer(config, kept), error)
    return Session(checkpoint, config, _device(device), data.tokenizer, data)


class OpenModel(NamedTuple):
    """What it takes to continue or to score a text."""

    model: LanguageModel
    tokenizer: Tokenizer
    title: str


def open_for_text(
    path: Path | str, data_path: str | None, device: Device, averaged: bool = False, k: int | None = None
) -> OpenModel:
    """A model in evaluation mode: of a run, of a checkpoint, or exported, which needs no data; `averaged`: the running
    average of a run's weights. Of the URL of one only what budget `k` needs is read.

    Raises:
        UserError: as `open_session`.
    """
    if is_url(path):
        model = open_model(path, k, averaged).to(_device(device))
        return OpenModel(model, open_tokenizer(path), without_secrets(str(path)))
    path = Path(path)
    if is_model_folder(path):
        folder = stored_model_folder(path, averaged)
        return OpenModel(load_model(folder).to(_device(device)), folder.tokenizer(), str(path))
    session = open_session(path, data_path, device, averaged)
    return OpenModel(session.model, session.tokenizer, f"{path}, {session.checkpoint.title}")


def _device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
