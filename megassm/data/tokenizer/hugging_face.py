"""Hugging Face's tokenizer.json, where it is byte-level BPE (GPT-2, GPT-NeoX, Llama 3, OLMo, Qwen ...).

Byte-level means that each character of a piece stands for one byte, by a fixed table (Radford et al., "Language
models are unsupervised multitask learners", 2019), so that every text has ids and every id a number of bytes.
Whatever else the file says may not lose text: Unicode normalisation, truncation, padding and dropout are left
out, and special tokens stand for nothing, in no text. A file that loses text even so is refused.
Needs the `tokenizers` package, an optional dependency.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megassm.data.tokenizer.ids import PROBE, Ids
from megassm.errors import UserError, install_hint
from megassm.guarded import MAX_VOCABULARY, TOKENIZER_BYTES, parse_json, read_bytes, read_json

FILE_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
USUAL_EOD_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eod|>", "<eos>", "<|eos|>")
PROBES = (PROBE, "x", "<s></s>", "a  b\n\n\n c")
CHUNK_CHARS = 1 << 20  # the memory of one call grows with its longest text
PRINTABLE = (range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))


def byte_characters() -> dict[str, int]:
    """The table: character of a piece -> byte. Printable bytes stand for themselves, others from U+0100 on."""
    themselves = [byte for span in PRINTABLE for byte in span]
    others = sorted(set(range(256)) - set(themselves))
    return {chr(byte): byte for byte in themselves} | {chr(256 + n): byte for n, byte in enumerate(others)}


class JsonTokenizer:
    """A tokenizer.json that loses nothing; others are refused."""

    def __init__(self, path: Path, eod_token: str | None = None) -> None:
        """Reads the file. EOD is `eod_token`, else the eos_token of the tokenizer_config.json beside it, else
        the first of `USUAL_EOD_TOKENS` that it knows.

        Raises:
            UserError: the package or the file is missing; no tokenizer, not byte-level, lossy or without EOD.
        """
        self._path = path
        self._raw, self._backend = _load(path)
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCABULARY:
            raise UserError(f"tokenizer {path}: has the id {self.vocab_size - 1:,}, ids end below {MAX_VOCABULARY:,}")
        self.name = f"json-{self.vocab_size}"
        self._eod_token = _eod_token(path, eod_token, vocabulary)
        self.eod = vocabulary[self._eod_token]
        self.sha256 = hashlib.sha256(self._raw + b"\0" + self._eod_token.encode()).hexdigest()
        self._pieces = self._bytes_of_pieces(vocabulary)
        own_text = [token.content for token in self._backend.get_added_tokens_decoder().values() if not token.special]
        for probe in (*PROBES, self._eod_token, " a ".join(["", *own_text, ""])):
            self._check_keeps(probe)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        chunks_per_text = [list(_chunks(text)) for text in texts]
        chunks = [chunk for chunks in chunks_per_text for chunk in chunks]
        encoded = iter(self._backend.encode_batch_fast(chunks, add_special_tokens=False))
        return [np.array([i for _ in chunks for i in next(encoded).ids], dtype=np.int64) for chunks in chunks_per_text]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._pieces[i] for i in ids).decode(errors="replace")

    def token_bytes(self) -> Ids:
        return np.array([len(piece) for piece in self._pieces], dtype=np.int64)

    def files(self) -> dict[str, bytes]:
        return {FILE_NAME: self._raw, CONFIG_NAME: json.dumps({"eos_token": self._eod_token}).encode() + b"\n"}

    def _bytes_of_pieces(self, vocabulary: dict[str, int]) -> list[bytes]:
        """What each id stands for; special tokens and holes in the numbering: nothing."""
        table = byte_characters()
        missing = [byte for character, byte in table.items() if character not in vocabulary]
        if missing:
            rule = f"not byte-level BPE: no piece stands for byte 0x{missing[0]:02x}, so some texts would be lost"
            raise UserError(f"tokenizer {self._path}: {rule}; take a byte-level one, or a SentencePiece .model")
        pieces = [b""] * self.vocab_size
        added = self._backend.get_added_tokens_decoder()
        for piece, number in vocabulary.items():
            if number not in added:
                known = all(character in table for character in piece)
                pieces[number] = bytes(table[c] for c in piece) if known else piece.encode()
            elif not added[number].special:
                pieces[number] = added[number].content.encode()
        pieces[self.eod] = b""
        return pieces

    def _check_keeps(self, text: str) -> None:
        [ids] = self.encode([text])
        if self.eod in ids:
            rule = f"text can spell its end-of-document token {self._eod_token!r}"
            raise UserError(f"tokenizer {self._path}: {rule}; mark the token as special there, or pass --eod-token")
        returned = self.decode(ids.tolist())
        if returned != text:
            rule = f"loses text ({text!r} comes back as {returned!r})"
            way_out = "it must be byte-level, add no space and strip none; take another, or a SentencePiece .model"
            raise UserError(f"tokenizer {self._path}: {rule}; {way_out}")


def _load(path: Path) -> tuple[bytes, Any]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        way_out = install_hint("tokenizers")
        raise UserError(f"tokenizer {path}: needs the package tokenizers, which is not installed; {way_out}") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process a core: `workers` says how many
    try:
        raw = read_bytes(path, TOKENIZER_BYTES)
        described = parse_json(raw, f"tokenizer {path}")
        _check_prefix(described, path)
        backend = Tokenizer.from_str(json.dumps(described))  # what was checked: of two entries Rust may take another
    except FileNotFoundError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}; give the path of a tokenizer.json") from None
    except UserError:
        raise
    except BaseException as error:  # the package raises `Exception`, and a panic of its Rust is none even of these
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise UserError(f"tokenizer {path}: not a tokenizer.json: {error}; give another file") from None
    backend.encode_special_tokens = True  # `<|endoftext|>` written in a text is text
    backend.normalizer = None
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    return raw, backend


def _check_prefix(described: Any, path: Path) -> None:
    """UserError for pieces that begin otherwise within a word, which byte-level BPE has not: the package cuts pieces in
    the middle of a character to take that off, and ends the process."""
    model = described.get("model") if isinstance(described, dict) else None
    if isinstance(model, dict) and model.get("continuing_subword_prefix"):
        rule = "not byte-level BPE: its pieces begin otherwise within a word (continuing_subword_prefix)"
        raise UserError(f"tokenizer {path}: {rule}; take a byte-level one, or a SentencePiece .model")


def _eod_token(path: Path, given: str | None, vocabulary: dict[str, int]) -> str:
    token = given or _configured_eod(path.with_name(CONFIG_NAME))
    if token is not None and token not in vocabulary:
        place = "" if given else f" (eos_token of {CONFIG_NAME})"
        raise UserError(f"tokenizer {path}: has no token {token!r}{place}; pass one that it has as --eod-token")
    usual = (usual for usual in USUAL_EOD_TOKENS if usual in vocabulary)
    token = token or next(usual, None)
    if token is None:
        rule = f"knows none of {', '.join(USUAL_EOD_TOKENS)} to end a document with"
        raise UserError(f"tokenizer {path}: {rule}; name its token with --eod-token")
    return token


def _configured_eod(path: Path) -> str | None:
    try:
        found = read_json(path, dict[str, Any], "repair it, or pass --eod-token")
    except FileNotFoundError:
        return None
    token = found.get("eos_token")
    if isinstance(token, dict):  # how some versions write it
        token = token.get("content")
    return token if isinstance(token, str) else None


def _chunks(text: str) -> Iterator[str]:
    """Cuts a long text before a space between two letters, where byte-level BPE begins a new word anyway."""
    start = 0
    while len(text) - start > CHUNK_CHARS:
        stop = start + CHUNK_CHARS
        space = text.rfind(" ", start, stop)
        while space > start and not (text[space - 1].isalpha() and text[space + 1].isalpha()):
            space = text.rfind(" ", start, space)
        stop = space if space > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]
