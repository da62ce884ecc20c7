"""A run's data: the training and validation shards of one directory, and the tokenizer that made them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.config import Config
from megassm.data.shards import ShardSet, load_index
from megassm.data.tokenizer import Tokenizer, load_tokenizer
from megassm.errors import UserError

TRAIN, VALID = "train", "valid"
TOKENIZER_NAME = "tokenizer.model"


class Dataset(NamedTuple):
    """Two disjoint sets of documents, in the ids of one tokenizer."""

    train: ShardSet
    valid: ShardSet
    tokenizer: Tokenizer

    def token_bytes(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """(V,) UTF-8 bytes of text each id stands for; 0 for ids of the model beyond the tokenizer's."""
        known = self.tokenizer.token_bytes()
        return np.pad(known, (0, vocab_size - len(known))).astype(np.int64)

    def document_end(self, config: Config) -> int | None:
        """The id that ends a document, where documents are to be kept apart."""
        return self.train.eod if config.data.isolate_documents else None


def open_dataset(config: Config) -> Dataset:
    """Reads both indexes and the tokenizer, and checks that they and the model belong together.

    Raises:
        UserError: something is missing or damaged, the tokenizer is not the one the shards were made with, or the
            model has too small a vocabulary.
    """
    directory = Path(config.data.path)
    if not directory.is_dir():
        raise UserError(
            f"data.path = {str(directory)!r}: no such directory; make a data set with tools/prepare_data.py "
            f"--input TEXT --output {directory}"
        )
    train = load_index(directory / TRAIN)
    if not (directory / VALID).is_dir():
        raise UserError(
            f"{directory}: has no {VALID}/, so quality could not be measured; prepare the data with a --valid-fraction"
        )
    valid = load_index(directory / VALID)
    spec = config.data.tokenizer or own_tokenizer(directory)
    tokenizer = load_tokenizer(spec)
    for shards in (train, valid):
        if shards.tokenizer_sha256 != tokenizer.sha256:
            raise UserError(
                f"{shards.directory}: its shards were made with tokenizer {shards.tokenizer} "
                f"(sha256 {shards.tokenizer_sha256[:12]}), not with {spec} ({tokenizer.sha256[:12]}); "
                "leave data.tokenizer out to use the data set's own, or prepare the data with this tokenizer"
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: must be at least the {tokenizer.vocab_size} ids of "
            f"tokenizer {tokenizer.name}; raise it, or prepare the data with a smaller vocabulary"
        )
    return Dataset(train, valid, tokenizer)


def own_tokenizer(directory: Path) -> str:
    """The tokenizer a data set was made with: a file beside the shards, or bytes."""
    model = directory / TOKENIZER_NAME
    return str(model) if model.exists() else "bytes"
