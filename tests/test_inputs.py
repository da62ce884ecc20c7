"""The data's door: what a file is, what is read of a folder, and the account of what is left out."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import Inputs, find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.unpack import open_unpacked
from megassm.errors import UserError

TEXTS = ["one\n", 'd\u00e9j\u00e0 [vu], {"a": 1} \u4e16\u754c', "three\\"]
RECORDS = [{"id": n, "text": text, "meta": {"text": text}} for n, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
OBJECTS = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()


def zstd(content: bytes) -> bytes:
    packed = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
        stream.write(content)
    return bytes(packed.getvalue())


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}  # fmt: skip


def tar_of(*members: tuple[str, bytes | str]) -> bytes:
    """A tar; a text in place of bytes makes a hard link to that member, with `->` before it a symbolic one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type = tarfile.SYMTYPE if content.startswith("->") else tarfile.LNKTYPE
                entry.linkname = content.removeprefix("->")
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def read(path: Path, counts: ReadCounts | None = None, **options: object) -> list[str]:
    source = TextSource((path,), **options)  # type: ignore[arg-type]
    return list(read_documents(source, find_inputs(source).files, counts or ReadCounts()))


def find(*paths: Path, **options: object) -> Inputs:
    return find_inputs(TextSource(paths, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES), ("a.JSONL", LINES), ("a.ndjson", LINES), ("a.jsonlines", LINES), ("a.json", LINES),
    ("a", LINES), ("a.log", LINES), ("a.txt", LINES), ("a.json", ARRAY), ("a.jsonl", ARRAY), ("a.json", OBJECTS),
    ("a.json", b"\xef\xbb\xbf" + ARRAY), ("a.Json", json.dumps(RECORDS).encode()), ("a.json", b"\n " + LINES),
    ("a.TAR", tar_of(*((f"{n}.txt", text.encode()) for n, text in enumerate(TEXTS)))),
    ("a.bin", tar_of(*((f"{n}.json", json.dumps(record).encode()) for n, record in enumerate(RECORDS)))),
])  # fmt: skip
def test_content_and_name_say_what_a_file_is(tmp_path: Path, name: str, content: bytes, packing: str) -> None:
    (tmp_path / (name + packing.upper())).write_bytes(PACKERS[packing](content))
    [path] = tmp_path.iterdir()
    assert read(path) == TEXTS
    (tmp_path / "no suffix").write_bytes(path.read_bytes())
    assert read(tmp_path / "no suffix") == TEXTS


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_text_is_one_document_in_every_letter_case(tmp_path: Path, packing: str) -> None:
    for name in ("a.txt", "b.TXT", "c.md"):
        (tmp_path / (name + packing)).write_bytes(PACKERS[packing](name.encode()))
    assert read(tmp_path) == ["a.txt", "b.TXT", "c.md"]


def test_any_file_can_be_forced_to_be_text_or_json(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_bytes(b'{"name": "x"}')
    (tmp_path / "a.txt").write_bytes(LINES)
    assert read(tmp_path, format="text") == [LINES.decode(), '{"name": "x"}']
    assert read(tmp_path / "a.txt", format="json") == TEXTS
    with pytest.raises(UserError, match=r"package\.json: record 1: no field 'text'; pass --text-field"):
        read(tmp_path / "package.json")


@pytest.mark.parametrize(("content", "message"), [
    (b"PK\x03\x04rest", "is a zip archive .*unpack it"),
    (b"%PDF-1.4\nrest", "is a PDF file"),
    ("text".encode("utf-16"), r"is UTF-16, text must be UTF-8; convert it: iconv -f UTF-16 -t UTF-8"),
    (("text " * 9).encode("utf-16-be"), "is UTF-16"),
    (b"\x01\0\xff\xfe\0\xff" * 9, "holds binary data, not text"),
    (gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), r"packed twice \(gzip, gzip\)"),
])  # fmt: skip
@pytest.mark.parametrize("policy", ["error", "skip", "replace"])
def test_packed_and_binary_bytes_are_never_text(tmp_path: Path, content: bytes, message: str, policy: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, glob="*.txt", on_bad_utf8=policy)


@pytest.mark.parametrize(("content", "message"), [
    (ARRAY[:-1], "the array does not end|no ',' or ']'"),
    (ARRAY[:-9], "not JSON"),
    (ARRAY + b" x", "something follows"),
    (b"[" + LINES + b"]", "no ',' or ']' after a value"),
    (b'[{"text": "a"},]', "no value after a comma"),
    (b'[{"text": "a"},', "no value after a comma"),
    (OBJECTS + b"]", "something follows"),
    (b'{"text": ' + b"[" * 100_000, "not JSON"),
])  # fmt: skip
def test_json_that_is_cut_or_followed_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.json")


def test_values_are_found_across_the_reads_of_a_long_file(tmp_path: Path) -> None:
    texts = ["\u00e9[" * (n * 317 % 40_000) + str(n) for n in range(60)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    assert read(tmp_path) == texts


def test_fields_within_fields_nulls_and_bad_records(tmp_path: Path) -> None:
    lines = b'{"meta": {"text": "a"}}\n{"meta": {"text": null}}\n{"meta.text": "b"}\n{"meta": 5}\n{\n[1]\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    parquet.write_table(
        pyarrow.table({"meta": [{"x": 1, "text": "c"}, None, {"x": 2, "text": None}]}), tmp_path / "b.parquet"
    )
    with pytest.raises(UserError, match=r"a\.jsonl:4: no field 'meta\.text'.*or --on-bad-record skip"):
        read(tmp_path, text_field="meta.text")
    for policy, empty, bad in (("skip", 3, 3), ("empty", 6, 0)):
        counts = ReadCounts()
        assert read(tmp_path, counts, text_field="meta.text", on_bad_record=policy) == ["a", "b", "c"]
        assert (counts.empty, counts.bad_record) == (empty, bad)


def test_a_folder_accounts_for_every_file_in_it(tmp_path: Path) -> None:
    for name in ("a.txt", "README.md", "b.pdf", "c.pdf", "d.tokens", "Makefile", ".hidden", "e.json"):
        (tmp_path / name).write_text('{"splits": 3}' if name == "e.json" else name)
    os.link(tmp_path / "a.txt", tmp_path / "z.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    found = find(tmp_path)
    assert [file.path.name for file in found.files] == ["README.md", "a.txt"]
    assert {why: len(paths) for why, paths in found.left_out.items()} == {
        "named *.pdf": 2, "named *.tokens": 1, "without suffix": 1, "hidden": 1, "broken links": 1,
        "JSON files without texts in 'text'": 1, "given twice, by another path or link": 1}  # fmt: skip
    left_out, about = found.summary()
    assert left_out.startswith("left out: 8 files: 2 named *.pdf (such as ")
    assert "README.md" in about


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    for folder in ("in", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}.txt").write_text(folder)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    found = find(tmp_path / "in")
    assert [file.path.name for file in found.files] == ["in.txt", "elsewhere.txt"]
    assert list(found.left_out) == ["folders given twice, by another path or link"]


def test_the_output_within_the_input_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset.md").write_text("not text to train on")
    assert [file.path.name for file in find(tmp_path, without=tmp_path / "out").files] == ["a.txt"]
    for folder, names in (("other", ("prepare.json", "dataset.md")), ("foreign", ("index.json", "index.npz"))):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text("{}")
    found = find(tmp_path, without=tmp_path / "out")
    assert [file.path.name for file in found.files] == ["a.txt"]
    assert [len(paths) for paths in found.left_out.values()] == [2]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "b.txt").chmod(0)
    with pytest.raises(UserError, match=r"b\.txt: cannot be read: Permission denied"):
        find(tmp_path)


def test_what_is_no_file_gets_a_hint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (Path("https://host/a.txt"), "is a URL; fetch it first"),
        (Path("~/a.txt"), "the shell did not expand '~'"),
        (tmp_path / "pipe", "is a pipe or device.*write it to a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            find(path)


def test_names_that_are_not_utf8_can_be_shown(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0"))
    folder.mkdir()
    (folder / "a.tokens").write_text("x")
    (folder / "a.txt").write_text("x")
    [line] = find(folder).summary()
    assert "d\\xe9j\\xe0/a.tokens" in line.encode().decode()


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_is_read_whole_or_refused(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    one, two = PACKERS[packing](b"one" * 400), PACKERS[packing](b"two" * 400)
    path.write_bytes(one + two)
    assert read(path) == ["one" * 400 + "two" * 400]
    for content in (one + two[:-1], one + two[:4], one[:-1], one[:12], one + b"trailing", b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.txt\.\w+: damaged \w+"):
            read(path)


def test_damage_anywhere_in_a_stream_is_never_shorter_data(tmp_path: Path) -> None:
    path = tmp_path / "a.bz2"
    packed = bytearray(bz2.compress(b"one" * 99) + bz2.compress(b"two" * 99))
    for position in range(10, len(packed)):
        packed[position] ^= 0x40
        path.write_bytes(packed)
        packed[position] ^= 0x40
        with open(path, "rb") as file, contextlib.suppress(UserError):  # or the bit has no meaning
            assert open_unpacked(path, "bzip2", file).read() == b"one" * 99 + b"two" * 99


def test_a_sample_of_a_tar_is_what_webdataset_and_tar_say(tmp_path: Path) -> None:
    path, counts = tmp_path / "a.tar", ReadCounts()
    path.write_bytes(tar_of(
        ("1.txt", b"one"), ("1.en.txt", b"beside it"), ("1.meta.json", b"{}"), ("2.en.txt", b"two"),
        ("2.fr.txt", b"deux"), ("v1.0/3.json", b'{"text": "three"}'), ("4.txt", "1.txt"), ("5.txt", "->1.txt"),
    ))  # fmt: skip
    assert read(path, counts) == ["one", "two", "deux", "three"]
    assert (counts.members.links, counts.members.others) == (2, 1)


@pytest.mark.parametrize("members", [
    [("1.json", b'{"text": "a"}'), ("2.json", b'{"text": "b"}'), ("1.txt", b"a"), ("2.txt", b"b")],
    [("1.txt", b"old"), ("2.txt", b"b"), ("1.txt", b"new")],
    [("1.txt", b"old"), ("1.txt", b"new")],
])  # fmt: skip
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_key_that_comes_twice_is_refused(
    tmp_path: Path, members: list[tuple[str, bytes | str]], packing: str
) -> None:
    (tmp_path / f"a.tar{packing}").write_bytes(PACKERS[packing](tar_of(*members)))
    with pytest.raises(UserError, match=r"1\.(txt|json): its key comes twice.*pack the tar again"):
        read(tmp_path)


def test_joined_tars_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of(("1.txt", b"a")) + tar_of(("2.txt", b"b")))
    with pytest.raises(UserError, match="another tar follows after offset 1024; give the files that were joined"):
        read(tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns named 'text'; rename one"):
        find(tmp_path)


def test_a_window_too_large_is_told_from_damage(tmp_path: Path) -> None:
    frame = b"\x28\xb5\x2f\xfd\x00\xa8" + (5 << 3 | 1).to_bytes(3, "little") + b"hello"  # a window of 2 GiB
    (tmp_path / "a.txt.zst").write_bytes(frame)
    with pytest.raises(UserError, match="asks for too large a window; unpack it first, with zstd -d --long=31"):
        find(tmp_path)
