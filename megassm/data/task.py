"""Tasks: labelled examples as an ordinary data set of token ids, in which every document is one example.

    id           0 .. A-1   A            A+1    A+2       A+3 ..
    stands for   answers    separator    pad    the end   symbols

    example      symbols and answers  separator  what is to be answered  pad .. pad  the end      `length` ids in all

An example is exactly as long as the model's sequence, so samples (`order`) and examples coincide, whatever the order of
the blocks. What counts are the answers after the separator: a label, or each answer of a list of queries and answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megassm.config.model import CHUNK
from megassm.errors import UserError
from megassm.guarded import MAX_VOCABULARY, TOKENIZER_BYTES, Described, read_json

TASK_NAME = "task.json"
TEXT_NAME = "text"
"""The task whose symbols are the bytes of a text."""
SEPARATOR_NAME, PAD_NAME, END_NAME = "=>", "_", "<end>"
Ids = npt.NDArray[np.int64]


class Example(NamedTuple):
    """What is seen, and what comes after the separator; ids of a `Task`."""

    seen: Ids
    asked: Ids
    """Answers, with the queries they belong to."""


@dataclass(frozen=True)
class Task:
    """What the ids of a task's data set mean."""

    name: str
    length: int
    """Ids an example, model.seq_len of who trains on it."""
    answers: tuple[str, ...]
    """Names of the answers: the classes, where an example has one."""
    symbols: tuple[str, ...]
    asked: int = 1
    """Answers that count, an example."""

    @property
    def separator(self) -> int:
        return len(self.answers)

    @property
    def pad(self) -> int:
        return len(self.answers) + 1

    @property
    def first_symbol(self) -> int:
        return len(self.answers) + 3

    @property
    def is_text(self) -> bool:
        """Whether the symbols are the bytes of a text."""
        return self.name == TEXT_NAME and len(self.symbols) == 256

    @property
    def between(self) -> str:
        """What stands between the names of ids in a text."""
        return "" if self.is_text else " "

    @property
    def content_length(self) -> int:
        """Ids that an example of one answer has room for before the separator."""
        return self.length - 3

    def ids(self, example: Example) -> Ids:
        """(length - 1,) an example without its end.

        Raises:
            UserError: it is too long, or does not ask what the task says.
        """
        ids = np.concatenate((example.seen, [self.separator], example.asked)).astype(np.int64)
        if ids.size > self.length - 1:
            raise UserError(
                f"{self.name}: an example of {len(example.seen)} ids needs sequences of {ids.size + 1}; "
                f"--length is {self.length}"
            )
        counted = int(np.count_nonzero(example.asked < len(self.answers)))
        if counted != self.asked or np.any(example.seen == self.separator):
            raise UserError(f"{self.name}: an example asks {counted} answers, not {self.asked}, or holds a separator")
        return np.pad(ids, (0, self.length - 1 - ids.size), constant_values=self.pad)


class TaskTokenizer:
    """The ids of a task by name. It cannot encode text."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._names = (*task.answers, SEPARATOR_NAME, PAD_NAME, END_NAME, *task.symbols)
        self._json = json.dumps(asdict(task), ensure_ascii=False).encode()
        self.name = f"task-{task.name}"
        self._ids = {name: i for i, name in enumerate(self._names)}  # a symbol, where an answer has its name
        self.vocab_size = len(self._names)
        self.eod = len(task.answers) + 2
        self.sha256 = hashlib.sha256(self._json).hexdigest()

    def encode(self, texts: Sequence[str]) -> NoReturn:
        raise UserError(f"the ids of task {self.task.name!r} are no text: nothing is prompted or prepared with them")

    def content(self, text: str) -> Ids:
        """What is seen of an example: the bytes of a text; of other tasks names, as `decode` has them.

        Raises:
            UserError: the task has nothing of that name.
        """
        if self.task.is_text:
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) + self.task.first_symbol
        names = text.split()
        if unknown := sorted(set(names) - self._ids.keys()):
            known = " ".join(self.task.symbols[:10])
            raise UserError(f"task {self.task.name!r} has no symbol {unknown[0]!r}; it has {known} .., apart by spaces")
        return np.array([self._ids[name] for name in names], dtype=np.int64)

    def text(self, ids: Sequence[int]) -> str:
        """What `content` makes these ids of; in a text, ids that are no bytes stand for nothing."""
        first = self.task.first_symbol
        if self.task.is_text:
            return bytes(i - first for i in ids if i >= first).decode(errors="replace")
        return " ".join(self._names[i] for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Names of the ids, padding left out."""
        return " ".join(self._names[i] for i in ids if i not in (self.task.pad, self.eod))

    @property
    def pieces(self) -> list[str]:
        """A name for every id, each once: symbols and the separator by theirs, the others in angle brackets."""
        labels = [f"<label {name}>" for name in self.task.answers]
        return [*labels, SEPARATOR_NAME, "<pad>", END_NAME, *self.task.symbols]

    def token_bytes(self) -> Ids:
        """1 for an answer: "bits per byte" of a task are bits an answer."""
        return (np.arange(self.vocab_size) < len(self.task.answers)).astype(np.int64)

    def files(self) -> dict[str, bytes]:
        return {TASK_NAME: self._json}


def fitting(seen: int) -> int:
    """A length for examples of `seen` ids and a label: whole chunks, so that any sequence split divides it."""
    return -(-(seen + 3) // CHUNK) * CHUNK


def load_task(path: Path) -> TaskTokenizer:
    """Reads a data set's task.json. UserError if the file is not a valid task."""
    way_out = "it is no task's description; make the data set again"
    try:
        found = read_json(path, _Description, way_out, TOKENIZER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {way_out}") from None
    return TaskTokenizer(Task(found.name, found.length, found.answers, found.symbols, found.asked))


class _Description(Described):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")]
    length: Annotated[int, Field(ge=3, le=2**30)]
    answers: Annotated[tuple[str, ...], Field(min_length=1, max_length=MAX_VOCABULARY)]
    symbols: Annotated[tuple[str, ...], Field(max_length=MAX_VOCABULARY)]
    asked: Annotated[int, Field(ge=1, le=2**30)]


def answer_mask(ids_BT: Ids, answers: int) -> npt.NDArray[np.bool_]:
    """(B, T - 1) which of the ids after the first are answers asked for; the last is the next example's first."""
    after_BL = np.cumsum(ids_BT[:, :-1] == answers, axis=1) > 0
    mask_BL: npt.NDArray[np.bool_] = after_BL & (ids_BT[:, 1:] < answers)
    mask_BL[:, -1] = False
    return mask_BL
