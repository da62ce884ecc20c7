"""The package's own tokenizers under transformers: the very ids of `megassm.data.tokenizer.base`, and of tasks."""

from __future__ import annotations

import re
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

from megassm.data.task import TASK_NAME, TaskTokenizer
from megassm.data.tokenizer.base import EOD_PIECE, MODEL_NAME, BytesTokenizer, Tokenizer, load_tokenizer

_OF_A_TEMPLATE = ContextVar("of_a_template", default=False)
"""Whether what is encoded is what a chat template gave."""


class MegaSSMTokenizer(PreTrainedTokenizer):
    """Exact: `decode(encode(text)) == text`.

    No text encodes to the end-of-document token, not its own name either, but for a chat template's, and where a call
    says `split_special_tokens=False`. Tokens that were added are not split. The tokenizer of a task reads the bytes of
    a text, or the task's symbols by name, apart by spaces.
    """

    vocab_files_names = {"vocab_file": MODEL_NAME, "task_file": TASK_NAME}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    add_prefix_space = False  # to words that come apart: nothing is put between them

    def __init__(self, vocab_file: str | None = None, task_file: str | None = None, **kwargs: Any) -> None:
        """`vocab_file`: a SentencePiece model; `task_file`: a task.json; neither is bytes."""
        self._own = load_tokenizer(task_file or vocab_file or BytesTokenizer.name)
        self._pieces = _pieces(self._own, vocab_file)
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        end = self._pieces[self._own.eod]
        defaults: dict[str, Any] = {"task_file": task_file, "eos_token": end, "pad_token": end, "bos_token": end}
        if isinstance(self._own, TaskTokenizer):
            task = self._own.task
            defaults |= {"pad_token": self._pieces[task.pad], "sep_token": self._pieces[task.separator]}
            defaults |= {"bos_token": None, "model_max_length": task.content_length}
        defaults |= {"padding_side": "left", "clean_up_tokenization_spaces": False, "split_special_tokens": None}
        self._special = {value for name, value in defaults.items() if name.endswith("_token") and value is not None}
        super().__init__(**{**defaults, **kwargs})

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return {**self._ids, **self.added_tokens_encoder}

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        """Of what was added: in a text the names of the tokenizer's own special tokens are no tokens."""
        added = [token.content for token in self._added_tokens_decoder.values() if token.content not in self._special]
        for name in (*added, *(unique_no_split_tokens or [])):
            self.tokens_trie.add(name)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]  # as the class above it does
        """With `split_special_tokens=False` the names of the tokenizer's own special tokens stand for them too."""
        split = kwargs.get("split_special_tokens")
        if split is False or (split is None and _OF_A_TEMPLATE.get()):
            parts = re.split(f"({'|'.join(map(re.escape, sorted(self._special)))})", text)
            found = [[part] if part in self._special else self._beside_own(part) for part in parts]
            return [token for tokens in found for token in tokens]
        return self._beside_own(text, **kwargs)

    def _beside_own(self, text: str, **kwargs: Any) -> list[str]:
        """A text may be the name of such a token, as a whole or between tokens that were added."""
        found = super().tokenize(text, **kwargs)
        return [piece for token in found for piece in (self._tokenize(token) if token in self._special else [token])]

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """The special tokens of the template's text are tokens."""
        before = _OF_A_TEMPLATE.set(True)
        try:
            return super().apply_chat_template(*args, **kwargs)
        finally:
            _OF_A_TEMPLATE.reset(before)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        own = self._own
        ids = own.content(text) if isinstance(own, TaskTokenizer) else own.encode([text])[0]
        return [self._pieces[i] for i in ids]

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if index < len(self._pieces) else f"<unused-{index}>"

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Special and added tokens show by their names, as transformers has it; ids of the model alone are nothing."""
        own = self._own
        text, between = (own.text, own.task.between) if isinstance(own, TaskTokenizer) else (own.decode, "")
        texts: list[str] = []
        ids: list[int] = []
        for token in tokens:
            if token in self._special or token in self._added_tokens_encoder:
                texts += [text(ids), token]
                ids = []
            elif token in self._ids:
                ids.append(self._ids[token])
        return between.join(part for part in (*texts, text(ids)) if part)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        paths = []
        for name, content in self._own.files().items():
            paths.append(Path(save_directory) / f"{prefix}{name}")
            paths[-1].write_bytes(content)
        return tuple(map(str, paths))


def _pieces(tokenizer: Tokenizer, vocab_file: str | None) -> list[str]:
    """A name for every id, each once."""
    if isinstance(tokenizer, TaskTokenizer):
        return tokenizer.pieces
    if vocab_file is None:
        return [f"<0x{byte:02X}>" for byte in range(256)] + [EOD_PIECE]
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]
