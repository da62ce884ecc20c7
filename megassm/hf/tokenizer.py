"""Bytes and SentencePiece as a transformers tokenizer: the very ids of `megassm.data.tokenizer.base`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from megassm.data.tokenizer.base import EOD_PIECE, MODEL_NAME, BytesTokenizer, Tokenizer, load_tokenizer


class MegaSSMTokenizer(PreTrainedTokenizer):
    """Exact: `decode(encode(text)) == text`. No text encodes to the end-of-document token, not its own name either."""

    vocab_files_names = {"vocab_file": MODEL_NAME}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, vocab_file: str | None = None, **kwargs: Any) -> None:
        """`vocab_file`: a SentencePiece model; None is bytes."""
        self._own: Tokenizer = load_tokenizer(vocab_file or BytesTokenizer.name)
        self._pieces = _pieces(vocab_file)
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        defaults = {
            "eos_token": EOD_PIECE,
            "pad_token": EOD_PIECE,
            "bos_token": EOD_PIECE,
            "padding_side": "left",
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        }
        super().__init__(**{**defaults, **kwargs})

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._pieces[i] for i in self._own.encode([text])[0]]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if index < len(self._pieces) else f"<unused-{index}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The end of a document shows by its name, as transformers has it; ids of the model alone stand for nothing."""
        texts, ids = [], []
        for token in tokens:
            if token != EOD_PIECE:
                ids += [self._ids[token]] if token in self._ids else []
                continue
            texts += [self._own.decode(ids), EOD_PIECE]
            ids = []
        return "".join([*texts, self._own.decode(ids)])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = []
        for name, content in self._own.files().items():
            paths.append(Path(save_directory) / f"{prefix}{name}")
            paths[-1].write_bytes(content)
        return tuple(map(str, paths))


def _pieces(vocab_file: str | None) -> list[str]:
    """A name for every id, each once."""
    if vocab_file is None:
        return [f"<0x{byte:02X}>" for byte in range(256)] + [EOD_PIECE]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]
