"""tokenizer.json: what Hugging Face's own package makes of a text, exactly, and refusals of what would lose it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megassm.data.tokenizer import hugging_face
from megassm.data.tokenizer.base import TokenizerSpec, load_tokenizer
from megassm.data.tokenizer.hugging_face import JsonTokenizer, byte_characters
from megassm.errors import UserError
from tests.test_tokenizer import HARD_TEXTS, check_exact, corpus, utf8_text

__all__ = ["corpus"]  # a fixture
LETTERS, OTHERS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3_WORDS = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{LETTERS}|{OTHERS}"


def gpt2_like(texts: list[str], eod: str = "<|endoftext|>") -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[eod], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend


def llama_3_like(texts: list[str]) -> tokenizers.Tokenizer:
    """With a word pattern of its own, a BOS template, a second special token and runs of spaces as added tokens."""
    backend = gpt2_like(texts, "<|end_of_text|>")
    pattern = tokenizers.Regex(LLAMA_3_WORDS)
    split = pre_tokenizers.Split(pattern, "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.add_special_tokens(["<|begin_of_text|>"])
    backend.add_tokens([AddedToken("      ", normalized=False), AddedToken("\u4e16\u754c", normalized=True)])
    begin = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    backend.enable_truncation(20)
    backend.enable_padding()
    return backend


@pytest.fixture(scope="session", params=[gpt2_like, llama_3_like])
def file(request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    request.param(corpus).save(str(path))
    return path


def test_hard_texts_round_trip_and_count_their_bytes(file: Path, corpus: list[str]) -> None:
    tokenizer = load_tokenizer(file)
    check_exact(tokenizer, [*HARD_TEXTS, "<|endoftext|> <|end_of_text|><|begin_of_text|>", *corpus])
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert tokenizer.decode([tokenizer.eod]) == ""


@settings(deadline=None, max_examples=60)
@given(st.lists(utf8_text, max_size=4))
def test_any_text_round_trips(file: Path, texts: list[str]) -> None:
    check_exact(JsonTokenizer(file), texts)


def test_ids_are_those_of_the_package(file: Path, corpus: list[str]) -> None:
    package = tokenizers.Tokenizer.from_file(str(file))
    package.no_truncation()
    package.no_padding()
    for text, ids in zip(corpus, load_tokenizer(file).encode(corpus), strict=True):
        assert ids.tolist() == package.encode(text, add_special_tokens=False).ids
        assert ids.size < 0.8 * len(text)


def test_a_long_text_gets_the_ids_of_its_words(file: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(file)
    whole = tokenizer.encode(corpus)
    monkeypatch.setattr(hugging_face, "CHUNK_CHARS", 1000)
    assert max(map(len, corpus)) > 10_000
    for text, ids in zip(corpus, whole, strict=True):
        assert tokenizer.encode([text])[0].tolist() == ids.tolist()
    check_exact(tokenizer, ["no newline at all " * 1000, "\n" * 10_000, "\n  " * 5000])


def test_the_table_of_bytes_is_the_packages(corpus: list[str]) -> None:
    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    by_package = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in map(chr, [*range(0x180), 0x4E16, 0x1F642]):
        [(written, _)] = by_package.pre_tokenize_str(character)
        assert bytes(byte_characters()[c] for c in written) == character.encode()


def test_unicode_normalisation_is_left_out(corpus: list[str], tmp_path: Path) -> None:
    backend = gpt2_like(corpus)
    backend.normalizer = normalizers.NFKC()
    backend.save(str(tmp_path / "a.json"))
    check_exact(load_tokenizer(tmp_path / "a.json"), ["e\u0301 \ufb01 \u2167"])


def test_the_end_of_document_is_found_or_given(corpus: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    backend = gpt2_like(corpus, "</s>")
    backend.add_special_tokens(["<|stop|>"])
    backend.save(str(path))
    usual, given = load_tokenizer(path), load_tokenizer(TokenizerSpec(str(path), "<|stop|>"))
    assert (usual.eod, given.eod) == (backend.token_to_id("</s>"), backend.token_to_id("<|stop|>"))
    assert usual.sha256 != given.sha256
    for config in ('{"eos_token": "<|stop|>"}', '{"eos_token": {"content": "<|stop|>"}}'):
        (tmp_path / "tokenizer_config.json").write_text(config)
        assert load_tokenizer(path).sha256 == given.sha256
    (tmp_path / "kept").mkdir()
    for name, content in given.files().items():
        (tmp_path / "kept" / name).write_bytes(content)
    assert load_tokenizer(tmp_path / "kept" / "tokenizer.json").sha256 == given.sha256


def _prefix_space(backend: Any) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def _strips_space(backend: Any) -> None:
    backend.add_tokens([AddedToken("pass", lstrip=True)])


def _spelled(backend: Any) -> None:
    backend.add_tokens([AddedToken("</s>", normalized=False)])


@pytest.mark.parametrize(
    ("change", "eod_token", "message"),
    [
        (_prefix_space, None, r"loses text \('x' comes back as ' x'\); it must be byte-level, add no space"),
        (_strips_space, None, r"loses text .*strip none"),
        (_spelled, "</s>", r"text can spell its end-of-document token '</s>'; mark the token as special there"),
        (lambda backend: None, "<no>", r"has no token '<no>'; pass one that it has as --eod-token"),
    ],
)
def test_refusals(
    corpus: list[str], tmp_path: Path, change: Callable[[Any], None], eod_token: str | None, message: str
) -> None:
    backend = gpt2_like(corpus)
    change(backend)
    backend.save(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match=r"tokenizer .*a\.json: " + message):
        load_tokenizer(TokenizerSpec(str(tmp_path / "a.json"), eod_token))


def test_other_files_are_refused(corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json: No such file or directory; give the path of a tokenizer\.json"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(UserError, match=r"a\.json: not a tokenizer\.json: .*; give another file"):
        load_tokenizer(path)
    gpt2_like(corpus, "<|finis|>").save(str(path))
    with pytest.raises(UserError, match=r"knows none of <\|endoftext\|>, .* name its token with --eod-token"):
        load_tokenizer(path)
    word_level = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    word_level.save(str(path))
    with pytest.raises(UserError, match=r"not byte-level BPE: no piece stands for byte 0x\w\w.*take a byte-level one"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: the whole: Input should be an object"):
        load_tokenizer(path)
    with pytest.raises(UserError, match=r"--eod-token is for a tokenizer\.json, and 'bytes' has an end of document"):
        load_tokenizer(TokenizerSpec("bytes", "</s>"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"needs the package tokenizers.*'\.\[tokenizers\]' in a checkout"):
        load_tokenizer(path)
