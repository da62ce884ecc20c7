"""Reading documents: text exactly as it is, refusals that name file and line, a sample that holds still."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megassm.data.prepare.documents import ReadCounts, read_documents, sample_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.errors import UserError

TEXTS = [f"{n} " + "d\u00e9j\u00e0 vu " * (n % 17) for n in range(300)]


def read(source: TextSource, counts: ReadCounts | None = None) -> list[str]:
    return list(read_documents(source, find_inputs(source).files, counts or ReadCounts()))


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    text = "\ufeffline\r\nline\rline\u2028 \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(TextSource((tmp_path,))) == [text.removeprefix("\ufeff")]  # a mark of the encoding, no text


def test_files_are_found_sorted_once_and_hidden_ones_are_not(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.txt", "x.py", ".git/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(TextSource((tmp_path / "x.py", tmp_path, tmp_path / "a.txt"))) == [
        "x.py",
        "a.txt",
        "b.txt",
        "deep/c.txt",
    ]
    assert read(TextSource((tmp_path,), glob="*.py")) == ["x.py"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xff", r"a\.txt: byte 2: 0xff is not UTF-8; repair it, or pass --on-bad-utf8 skip or replace"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xe9"}', r"a\.jsonl:3: byte \d+ of the line: 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "a\\ud83d"}', r"a\.jsonl:1: character 1 of the text: U\+D83D is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl:2: not JSON: .*one JSON object"),
        ("a.jsonl", b"[1]", r"a\.jsonl: record 1: int, there must be one JSON object"),
        ("a.jsonl", b'{"text": "x"}\n[1]', r"a\.jsonl:2: list, there must be one JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}', r"a\.jsonl:1: no field 'text'; pass --text-field .*body, id"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: field 'text' is int, it must be a string"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: damaged gzip: it does not begin as one"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12],
            r"gz: damaged gzip after \d+ bytes",
        ),
        ("a.parquet", b"PAR1", r"a\.parquet: damaged Parquet file: .*fetch the file again"),
        ("a.jsonl.zst", b"not zstd", r"a\.jsonl\.zst: damaged zstd: it does not begin as one"),
        ("a.tar", b"x" * 2000, r"a\.tar: offset 0: not a sound tar file"),
        ("a.txt.xz", b"", r"a\.txt\.xz: damaged xz: it is empty"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(TextSource((tmp_path / name,)))


def test_missing_inputs_are_refused(tmp_path: Path) -> None:
    for source, message in (
        (TextSource((tmp_path / "no",)), r"--input .*no: no such file or directory"),
        (TextSource((tmp_path,)), r"holds no file named \*\.txt or .*pass --glob"),
        (TextSource((tmp_path,), glob="*.py"), r"holds no file named \*\.py; give another --glob"),
        (TextSource((tmp_path,), glob="/etc/*"), r"--glob '/etc/\*': .*give a pattern of file names"),
    ):
        with pytest.raises(UserError, match=message):
            find_inputs(source)


def test_bad_utf8_is_skipped_and_counted_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n{"text": "\\udc00"}\n{"text": " "}\n')
    counts = ReadCounts()
    assert read(TextSource((tmp_path,), on_bad_utf8="skip"), counts) == ["good"]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert counts == ReadCounts(documents=1, empty=1, bad_utf8=3, file_bytes=size)


def test_bad_utf8_is_repaired_and_counted_where_asked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\xffb")
    lines = b'{"text": "good"}\n{"text": "\xe9t\xe9"}\n{"text": "\\udc00x"}\n{"text": "\\ud83d\\ude42"}\n'
    (tmp_path / "b.jsonl").write_bytes(lines)
    counts = ReadCounts()
    texts = read(TextSource((tmp_path,), on_bad_utf8="replace"), counts)
    assert texts == ["a\ufffdb", "good", "\ufffdt\ufffd", "\ufffdx", "\U0001f642"]
    assert (counts.documents, counts.repaired, counts.bad_utf8) == (5, 3, 0)


def test_length_is_counted_in_utf8_bytes(tmp_path: Path) -> None:
    texts = ["a", "\u00e9", "abc", "\u4e16\u754c", "1234567"]  # 1, 2, 3, 6, 7 bytes
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    counts = ReadCounts()
    assert read(TextSource((tmp_path,), min_document_bytes=2, max_document_bytes=6), counts) == texts[1:4]
    assert (counts.documents, counts.too_short, counts.too_long) == (3, 1, 1)
    for options, message in (
        ({"min_document_bytes": 9, "max_document_bytes": 8}, r"max_document_bytes is 8; .*min_document_bytes \(9\)"),
        ({"max_document_bytes": 0}, "max_document_bytes is 0; it must be at least 1"),
        ({"min_document_bytes": -1}, "min_document_bytes is -1, it must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            TextSource((tmp_path,), **options)  # type: ignore[arg-type]


@given(order=st.permutations(TEXTS[:40]), max_bytes=st.integers(1, 3000))
def test_a_sample_does_not_depend_on_order_and_keeps_its_bound(order: list[str], max_bytes: int) -> None:
    sample = sample_documents(order, max_bytes, seed=1)
    assert sample == sample_documents(TEXTS[:40], max_bytes, seed=1)
    assert sum(len(text.encode()) for text in sample) <= max_bytes


def test_a_sample_is_of_whole_documents_by_seed() -> None:
    samples = [sample_documents(TEXTS, 5000, seed) for seed in (1, 2)]
    assert samples[0] != samples[1]
    for sample in samples:
        assert set(sample) < set(TEXTS)
        assert sum(len(text.encode()) for text in sample) > 4500
    assert sample_documents(["\u00e9" * 10], 5, seed=0) == ["\u00e9\u00e9"]
    assert sorted(sample_documents(TEXTS, 10**9, seed=0)) == sorted(TEXTS)
