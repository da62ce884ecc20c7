"""A run's data: training and validation shards, one data set or a mixture, and the tokenizer that made them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.config.schema import Config
from megassm.data.cache import local_copies
from megassm.data.index import ShardSet, load_index
from megassm.data.mixture import ONE_SOURCE, DataSource, Mixture, MixturePhase, ReadOptions
from megassm.data.request import Store
from megassm.data.stores import LocalStore, open_store
from megassm.data.task import TASK_NAME, Task, TaskTokenizer
from megassm.data.tokenizer.base import MODEL_NAME, BytesTokenizer, Tokenizer, load_tokenizer
from megassm.data.tokenizer.hugging_face import CONFIG_NAME, FILE_NAME
from megassm.data.transport import Patience, read_file
from megassm.errors import UserError
from megassm.files import write_atomically
from megassm.guarded import TOKENIZER_BYTES, read_bytes

TRAIN, VALID = "train", "valid"
TOKENIZER_NAMES = (MODEL_NAME, FILE_NAME, CONFIG_NAME, TASK_NAME)
FETCH_SHARE = 0.5  # of parallel.timeout_s, for all attempts at one block
BATCH_SHARE = 0.8  # for one batch: a rank must say what it waits for before the others give it up


class Dataset(NamedTuple):
    """Two disjoint sets of documents, in the ids of one tokenizer."""

    train: Mixture
    valid: Mixture
    tokenizer: Tokenizer

    def token_bytes(self, vocab_size: int) -> npt.NDArray[np.int64]:
        """(V,) UTF-8 bytes of text each id stands for; 0 for ids of the model beyond the tokenizer's."""
        return padded_token_bytes(self.tokenizer, vocab_size)

    @property
    def task(self) -> Task | None:
        """What the examples of a labelled data set are; None for text."""
        return self.tokenizer.task if isinstance(self.tokenizer, TaskTokenizer) else None

    def document_end(self, config: Config) -> int | None:
        """The id that ends a document, where documents are to be kept apart."""
        return self.train.eod if config.data.isolate_documents else None


def padded_token_bytes(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int64]:
    """See `Dataset.token_bytes`."""
    known = tokenizer.token_bytes()
    return np.pad(known, (0, vocab_size - len(known))).astype(np.int64)


def open_dataset(config: Config) -> Dataset:
    """Reads the indexes and the tokenizer, and checks that they, the model and the plan belong together.

    Raises:
        UserError: something is missing or damaged, the tokenizer is not the one the shards were made with, the model
            has too small a vocabulary.
    """
    # sorted: the order of lines in a file of YAML must not decide which source a sample comes from
    paths = dict(sorted(config.data.sources.items())) or {ONE_SOURCE: config.data.path or ""}
    train, valid = [], []
    spec = ""
    tokenizer: Tokenizer | None = None
    for name, path in paths.items():
        knob = f"data.sources.{name}" if config.data.sources else "data.path"
        store = _open(knob, path)
        train.append(DataSource(name, load_index(store.child(TRAIN))))
        valid.append(DataSource(name, _valid_index(store)))
        if tokenizer is None:
            spec = config.data.tokenizer or own_tokenizer(store, train[-1].shards)
            tokenizer = load_tokenizer(spec)
        for _, shards in (train[-1], valid[-1]):
            _check_tokenizer(shards, tokenizer, spec)
    assert tokenizer is not None
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}: must be at least the {tokenizer.vocab_size} ids of "
            f"tokenizer {tokenizer.name}; raise it, or prepare the data with a smaller vocabulary"
        )
    task = tokenizer.task if isinstance(tokenizer, TaskTokenizer) else None
    _check_task(config, task)
    answers = None if task is None else len(task.answers)
    mixture = Mixture(tuple(train), _phases(config), _reading(config), answers)
    return Dataset(mixture, Mixture(tuple(valid), _phases(config), _reading(config), answers), tokenizer)


def _open(knob: str, path: str) -> Store:
    store = open_store(path)
    if isinstance(store, LocalStore) and not store.directory.is_dir():
        here = "" if store.directory.is_absolute() else f" in {Path.cwd()}"
        raise UserError(
            f"{knob} = {str(store.directory)!r}: no such directory{here}; make a data set with tools/prepare_data.py "
            f"--input TEXT --output {store.directory}"
        )
    return store


def _valid_index(store: Store) -> ShardSet:
    if isinstance(store, LocalStore) and not (store.directory / VALID).is_dir():
        way_out = "prepare the data with a --valid-fraction"
        raise UserError(f"{store.place}: has no {VALID}/, so quality could not be measured; {way_out}")
    return load_index(store.child(VALID))


def _check_tokenizer(shards: ShardSet, tokenizer: Tokenizer, spec: str) -> None:
    if shards.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"{shards.store.place}: its shards were made with tokenizer {shards.tokenizer} "
            f"(sha256 {shards.tokenizer_sha256[:12]}), not with {spec} ({tokenizer.sha256[:12]}); "
            "leave data.tokenizer out to use the data set's own, or prepare the data with this tokenizer"
        )


def _check_task(config: Config, task: Task | None) -> None:
    """A task's examples are the model's sequences, and its classes the model's."""
    model = config.model
    if task is None:
        if model.classes is not None:
            raise UserError(
                f"model.classes = {model.classes}: must be null, for the data set is text without labels; "
                "make a labelled one with tools/make_task.py"
            )
        return
    if model.seq_len != task.length:
        raise UserError(
            f"model.seq_len = {model.seq_len}: must be {task.length}, the length of an example of task {task.name!r}"
        )
    if model.classes is not None and (model.classes, task.asked) != (len(task.answers), 1):
        raise UserError(
            f"model.classes = {model.classes}: task {task.name!r} has {len(task.answers)} answers, {task.asked} asked "
            "for in an example; set that number where one is asked for, or null to predict answers as next tokens"
        )


def _phases(config: Config) -> tuple[MixturePhase, ...]:
    if not config.data.sources:
        return (MixturePhase(0, {ONE_SOURCE: 1.0}),)
    return tuple(MixturePhase(phase.start_step, phase.sources) for phase in config.data.phases)


def _reading(config: Config) -> ReadOptions:
    data, timeout_s = config.data, config.parallel.timeout_s
    return ReadOptions(
        patience=Patience(deadline_s=FETCH_SHARE * timeout_s),
        batch_wait_s=BATCH_SHARE * timeout_s,
        cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        cache_bytes=int(data.cache_gib * 2**30),
        on_bad_block=data.on_bad_block,
    )


def own_tokenizer(place: Path | Store, shards: ShardSet | None = None) -> str:
    """The tokenizer a data set was made with: a file beside the shards, or bytes.

    Of a remote set only the files are asked for that its `shards` need: some servers deny what is not there.
    """
    store = LocalStore(place) if isinstance(place, Path) else place
    if isinstance(store, LocalStore):
        files = (store.directory / name for name in (TASK_NAME, MODEL_NAME, FILE_NAME))
        return next((str(path) for path in files if path.exists()), BytesTokenizer.name)
    assert shards is not None
    if shards.tokenizer_sha256 == BytesTokenizer.sha256:
        return BytesTokenizer.name
    names: tuple[str, ...] = (FILE_NAME, CONFIG_NAME) if shards.tokenizer.startswith("json-") else (MODEL_NAME,)
    if shards.tokenizer.startswith("task-"):
        names = (TASK_NAME,)
    try:
        return str(local_copies({name: read_file(store, name) for name in names}) / names[0])
    except FileNotFoundError:
        raise UserError(
            f"{store.place}: has no {' and '.join(names)}, the tokenizer {shards.tokenizer} of its shards; upload it, "
            "or set data.tokenizer"
        ) from None


def run_tokenizer(config: Config, kept: Path) -> Tokenizer:
    """The tokenizer of a run: what its run directory `kept`, or else, of an older run, that of its data.

    Raises:
        UserError: neither is there.
    """
    if kept.is_dir():
        return load_tokenizer(own_tokenizer(kept))
    try:
        return open_dataset(config).tokenizer
    except UserError as error:
        way_out = "bring that back, or copy the data set's tokenizer to that folder"
        raise UserError(f"{kept}: no such folder, and the run's data cannot be opened: {error}; {way_out}") from None


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Puts the tokenizer's files beside the shards, where `own_tokenizer` finds them.

    Raises:
        UserError: files of another tokenizer are there; they are left alone.
    """
    files = tokenizer.files()
    rule = f"is not the tokenizer of these shards ({tokenizer.name}), or ends documents with another token"
    for path in (directory / TASK_NAME, directory / MODEL_NAME, directory / FILE_NAME):
        if path.exists() and read_bytes(path, TOKENIZER_BYTES, "move it") != files.get(path.name):
            raise UserError(f"{path}: {rule}; move it and what belongs to it out of {directory}")
    for name, content in files.items():
        if not (directory / name).exists():
            write_atomically(directory / name, content)
    own = own_tokenizer(directory)
    if load_tokenizer(own).sha256 != tokenizer.sha256:  # the other file beside it says so
        raise UserError(f"{own}: {rule}; move it and what belongs to it out of {directory}")
