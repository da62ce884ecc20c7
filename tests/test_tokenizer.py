"""Tokenizers lose nothing, count bytes exactly, and refuse what they cannot do with a way out."""

from __future__ import annotations

import json
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.tokenizer import base as tokenizer_module
from megassm.data.tokenizer.base import BytesTokenizer, Tokenizer, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from tests.conftest import run_python

HARD_TEXTS = (
    "",
    " ",
    "  leading, trailing  ",
    "def f(x):\n\tif x:\n\t\treturn 1\r\n\n\n        pass\n",
    "literal \u2581 and \u2581\u2581 of SentencePiece",
    "<|eod|> <unk> <0x0A>",
    "nul \0 bell \x07",
    "\u4e16\u754c \U0001f642 e\u0301 \ufb01 \u2167 \u3000 \ufeff \u2028",
    "x" * 1000 + "\n" * 50 + "\t" * 50,
)
utf8_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    return [path.read_text(encoding="utf-8") for path in sorted((library / "json").glob("*.py"))]


@pytest.fixture(scope="session", params=["bytes", "bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return load_tokenizer("bytes")
    path = tmp_path_factory.mktemp("tokenizer") / "a.model"
    path.write_bytes(train_sentencepiece(corpus, vocab_size=600, model_type=request.param))
    return load_tokenizer(path)


def check_exact(tokenizer: Tokenizer, texts: list[str]) -> None:
    bytes_per_id = tokenizer.token_bytes()
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids.tolist()) == text
        assert bytes_per_id[ids].sum() == len(text.encode())
        assert tokenizer.eod not in ids


def test_hard_texts_round_trip_and_count_their_bytes(tokenizer: Tokenizer, corpus: list[str]) -> None:
    check_exact(tokenizer, [*HARD_TEXTS, *corpus])
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.eod] == 0
    assert tokenizer.decode([tokenizer.eod]) == ""
    assert tokenizer.encode([]) == []


@settings(deadline=None, max_examples=60)
@given(st.lists(utf8_text, max_size=4))
def test_any_text_round_trips(tokenizer: Tokenizer, texts: list[str]) -> None:
    check_exact(tokenizer, texts)


def test_bytes_are_the_bytes() -> None:
    assert BytesTokenizer().encode(["h\u00e9"])[0].tolist() == [0x68, 0xC3, 0xA9]
    assert (BytesTokenizer.vocab_size, BytesTokenizer.eod) == (257, 256)


def test_ids_cut_inside_a_character_decode_to_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["\U0001f642"])[0].tolist()
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_indentation_becomes_pieces(corpus: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(corpus, vocab_size=600))
    assert load_tokenizer(path).encode([" " * 8])[0].size == 1


def test_a_long_text_gets_the_ids_of_its_lines(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.model"
    path.write_bytes(train_sentencepiece(corpus, vocab_size=600))
    tokenizer = load_tokenizer(path)
    whole = tokenizer.encode(corpus)
    monkeypatch.setattr(tokenizer_module, "CHUNK_CHARS", 300)
    for ids, ids_in_chunks in zip(whole, tokenizer.encode(corpus), strict=True):
        assert ids.tolist() == ids_in_chunks.tolist()
    check_exact(tokenizer, ["no newline at all " * 100])


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_gives_the_same_bytes_again(corpus: list[str], model_type: str) -> None:
    first, again = (train_sentencepiece(corpus, 500, model_type) for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert str(Path.cwd()).encode() not in first


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["abc def " * 20], 8000, r"the text allows \d+ at most; lower --vocab-size or give more text"),
        (["abc def " * 20], 262, r"need more than \d+; raise --vocab-size"),
        (["abc def " * 20], 0, r"vocabulary of 0: 256 bytes, 2 control pieces .* make 259; raise --vocab-size"),
        ([], 300, "no text to train on"),
        (["\n\n"], 300, "no text to train on"),
    ],
)
def test_training_refusals(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, vocab_size)


def test_loading_refusals(tmp_path: Path, corpus: list[str]) -> None:
    with pytest.raises(UserError, match=r"no\.model: No such file.*train_tokenizer"):
        load_tokenizer(tmp_path / "no.model")
    for content in (b"", b"not a model"):
        (tmp_path / "a.model").write_bytes(content)
        with pytest.raises(UserError, match=r"a\.model: not a SentencePiece model"):
            load_tokenizer(tmp_path / "a.model")


def test_a_model_that_loses_text_is_refused(tmp_path: Path, corpus: list[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(corpus).split("\n")),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=300,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"lossy\.model: loses text .*train one with"):
        load_tokenizer(tmp_path / "lossy.model")


def test_the_tool(tmp_path: Path) -> None:
    folder, table = Path(sysconfig.get_paths()["stdlib"]) / "json", tmp_path / "table.json"
    command = ("tools/train_tokenizer.py", "--input", str(folder), "--glob", "*.py", "--max-bytes", "30000")
    for name in ("a", "b"):
        options = ("--vocab-size", "400", "--output", str(tmp_path / name), "--json", str(table))
        run_python(*command, *options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    [row] = json.loads(table.read_text())
    assert row["vocab_size"] == 400
    assert row["sample_bytes"] <= 30_000
    assert row["bytes_per_token"] > 1.2

    refused = run_python(*command, "--vocab-size", "90000", "--output", str(tmp_path / "c"), check=False)
    assert refused.returncode == 1
    assert re.search(r"error: vocabulary of 90000: the text allows \d+ at most", refused.stderr)
    assert not (tmp_path / "c").exists()

    (tmp_path / "notes.txt").write_text("not to be lost")
    refused = run_python(*command, "--vocab-size", "400", "--output", str(tmp_path / "notes.txt"), check=False)
    assert refused.returncode == 1
    assert "notes.txt: exists and is no SentencePiece model; give another file" in refused.stderr
    assert (tmp_path / "notes.txt").read_text() == "not to be lost"
    refused = run_python(*command, "--vocab-size", "400", "--output", str(tmp_path), check=False)
    assert refused.returncode == 2
    assert "is a directory; give a file's name" in refused.stderr
    assert "\nexample:\n  python tools/train_tokenizer.py --input" in run_python(command[0], "--help").stdout
