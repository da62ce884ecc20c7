"""Text to token ids and back, exactly: raw bytes, a SentencePiece model, or a tokenizer.json (`tokenizer_json`).

Exactly means that `decode(encode(text)) == text` for every text, and that every id stands for a fixed
number of UTF-8 bytes (`token_bytes`). Bits per byte, the one score that compares tokenizers, needs both.

Kudo and Richardson, "SentencePiece", EMNLP 2018 (arXiv:1808.06226).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megassm.data.task import TASK_NAME, load_task
from megassm.data.tokenizer.hugging_face import JsonTokenizer
from megassm.data.tokenizer.ids import PROBE, Ids
from megassm.errors import UserError
from megassm.guarded import MAX_VOCABULARY, TOKENIZER_BYTES, read_bytes

ModelType = Literal["bpe", "unigram"]

MODEL_NAME = "tokenizer.model"
EOD_PIECE = "<|eod|>"
LEAST_VOCAB_SIZE = 259
SPACE_MARK = "\u2581"  # how SentencePiece writes a space inside a piece
CHUNK_CHARS = 1 << 18  # SentencePiece's memory grows with the length of one call's longest text
TRAINING_LINE_CHARS = 4096
TRAINING_LINE_MAX_BYTES = 4 * TRAINING_LINE_CHARS  # SentencePiece drops longer lines silently: none is
TRAINING_THREADS = 8  # part of the result (the order of sums, a field of the model file): never cpu_count()
TRAIN_ONE = "train one with tools/train_tokenizer.py"


class Tokenizer(Protocol):
    """What data preparation, training and scoring need of a tokenizer; a closed set of four."""

    @property
    def name(self) -> str:
        """A short name for tables and the shard index."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""

    @property
    def eod(self) -> int:
        """The id that ends a document; no text encodes to it."""

    @property
    def sha256(self) -> str:
        """Identifies the mapping: shards and checkpoints made with another one are refused."""

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """One int64 array of ids a text, without EOD. A text must be encodable as UTF-8."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text; EOD stands for nothing, bytes that are not UTF-8 become U+FFFD."""

    def token_bytes(self) -> Ids:
        """(vocab_size,): UTF-8 bytes an id stands for. Summed over `encode(text)` it is the text's length."""

    def files(self) -> dict[str, bytes]:
        """What to keep beside a data set so that the tokenizer can be loaded from there, by file name."""


class BytesTokenizer:
    """Ids 0-255 are the bytes of UTF-8, 256 is EOD. Needs no training: for tests and first runs."""

    name = "bytes"
    vocab_size = 257
    eod = 256
    sha256 = hashlib.sha256(b"utf-8 bytes, eod 256").hexdigest()

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if i != self.eod).decode(errors="replace")

    def token_bytes(self) -> Ids:
        counts = np.ones(self.vocab_size, dtype=np.int64)
        counts[self.eod] = 0
        return counts

    def files(self) -> dict[str, bytes]:
        return {}


class SentencePieceTokenizer:
    """A SentencePiece model that loses nothing (see `train_sentencepiece`); others are refused."""

    def __init__(self, path: Path) -> None:
        """Reads a `.model` file. UserError where it is missing, not a model, lossy or without EOD."""
        try:
            model = read_bytes(path, TOKENIZER_BYTES)
        except FileNotFoundError as error:
            way_out = "give 'bytes' or a file made by tools/train_tokenizer.py"
            raise UserError(f"tokenizer {path}: {error.strerror}; {way_out}") from None
        self._model = model
        self._processor = _load_processor(model, path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.name = f"sentencepiece-{self.vocab_size}"
        self.eod: int = self._processor.eos_id()
        if self.eod < 0:
            raise UserError(f"tokenizer {path}: has no end-of-text piece; {TRAIN_ONE}")
        try:
            self._pieces = [_piece_bytes(self._processor, i) for i in range(self.vocab_size)]
        except (ValueError, IndexError) as error:
            raise UserError(f"tokenizer {path}: a piece of it is not text ({error}); {TRAIN_ONE}") from None
        space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._space_mark_ids: list[int] = space_mark_ids
        self._out_type = _out_type(self._processor)
        returned = self.decode(self.encode([PROBE])[0].tolist())
        if returned != PROBE:
            raise UserError(
                f"tokenizer {path}: loses text ({PROBE!r} comes back as {returned!r}); it must keep "
                f"whitespace, normalise nothing and fall back to bytes: {TRAIN_ONE}"
            )

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        chunks_per_text = [list(_chunks(text)) for text in texts]
        spans = [chunk for chunks in chunks_per_text for chunk in chunks if chunk != SPACE_MARK]
        encoded = iter(self._processor.encode(spans, out_type=self._out_type, num_threads=1) if spans else [])
        result = []
        for chunks in chunks_per_text:
            ids = [self._space_mark_ids if chunk == SPACE_MARK else next(encoded) for chunk in chunks]
            whole = ids[0] if len(ids) == 1 else np.concatenate(ids) if ids else ()
            result.append(np.asarray(whole, dtype=np.int64))
        return result

    def decode(self, ids: Sequence[int]) -> str:
        # SentencePiece's own decode would turn a U+2581 of the text into a space.
        return b"".join(self._pieces[i] for i in ids).decode(errors="replace")

    def token_bytes(self) -> Ids:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def files(self) -> dict[str, bytes]:
        return {MODEL_NAME: self._model}


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer, as a user names it."""

    name: str = BytesTokenizer.name  # or the path of a SentencePiece .model or a tokenizer.json
    eod_token: str | None = None  # of a tokenizer.json; None: what the file says


def load_tokenizer(spec: str | Path | TokenizerSpec) -> Tokenizer:
    """The tokenizer of that name. UserError if there is no such tokenizer."""
    if not isinstance(spec, TokenizerSpec):
        spec = TokenizerSpec(str(spec))
    if Path(spec.name).name == TASK_NAME:
        return load_task(Path(spec.name))
    if spec.name.endswith(".json"):
        return JsonTokenizer(Path(spec.name), spec.eod_token)
    if spec.eod_token is not None:
        rule = f"--eod-token is for a tokenizer.json, and {spec.name!r} has an end of document of its own"
        raise UserError(f"{rule}; leave it out")
    if spec.name == BytesTokenizer.name:
        return BytesTokenizer()
    return SentencePieceTokenizer(Path(spec.name))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, model_type: ModelType = "bpe") -> bytes:
    """A `.model` file's bytes, the same for the same texts in the same order.

    Lines are trained on without their newline, so that no piece holds one: a newline is always the
    byte piece `<0x0A>`, and cutting a long text at newlines never changes its ids.
    UserError where the texts are empty or too small, or `vocab_size` too small for their alphabet.
    """
    import sentencepiece

    if vocab_size > MAX_VOCABULARY:
        raise UserError(f"vocabulary of {vocab_size}: ids end below {MAX_VOCABULARY:,}; lower --vocab-size")
    if vocab_size < LEAST_VOCAB_SIZE:
        rule = f"256 bytes, 2 control pieces and at least one piece make {LEAST_VOCAB_SIZE}"
        raise UserError(f"vocabulary of {vocab_size}: {rule}; raise --vocab-size")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            eos_piece=EOD_PIECE,
            max_sentence_length=TRAINING_LINE_MAX_BYTES,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_refusal(str(error), vocab_size)) from None
    return model.getvalue()


def _training_refusal(message: str, vocab_size: int) -> str:
    place = f"vocabulary of {vocab_size}"
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return f"{place}: the text allows {found[1]} at most; lower --vocab-size or give more text"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{place}: the text's alphabet and the 256 bytes need more than {found[1]}; raise --vocab-size"
    if "sentences_.empty()" in message:
        return "no text to train on: every document is empty; give --input files with text"
    return f"{place}: SentencePiece refuses: {message}"


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), TRAINING_LINE_CHARS):
                yield line[start : start + TRAINING_LINE_CHARS]


def _chunks(text: str) -> Iterator[str]:
    """Cuts a text at every U+2581 (yielded by itself) and, where it is long, at newlines."""
    for span in re.split(f"({SPACE_MARK})", text) if SPACE_MARK in text else [text]:
        start = 0
        while len(span) - start > CHUNK_CHARS:
            newline = span.rfind("\n", start, start + CHUNK_CHARS)
            stop = newline + 1 if newline >= 0 else start + CHUNK_CHARS
            yield span[start:stop]
            start = stop
        if start < len(span):
            yield span[start:]


def is_sentencepiece_model(content: bytes) -> bool:
    """Whether SentencePiece can load it."""
    import sentencepiece

    try:
        return bool(content) and sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size() > 0
    except Exception:  # RuntimeError, or another where its message holds bytes of the file that are not UTF-8
        return False


def _out_type(processor: Any) -> Any:
    """Arrays, where this version of SentencePiece gives them: a list of Python's integers costs a third of encoding."""
    try:
        processor.encode(["a"], out_type="numpy")
    except (ValueError, TypeError, RuntimeError):
        return int
    return "numpy"


def _load_processor(model: bytes, path: Path) -> Any:
    import sentencepiece

    if not is_sentencepiece_model(model):
        way_out = "give 'bytes', a .model file made by tools/train_tokenizer.py, or a tokenizer.json"
        raise UserError(f"tokenizer {path}: not a SentencePiece model; {way_out}")
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _piece_bytes(processor: Any, token_id: int) -> bytes:
    """The text an id stands for: a byte, a piece with its spaces, nothing for control pieces."""
    if processor.is_control(token_id) or processor.is_unknown(token_id):
        return b""
    piece: str = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE_MARK, " ").encode()
