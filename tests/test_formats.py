"""File formats: each gives the documents it was made of; damage is refused, never shorter data."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.tar import split_name, tar_members
from megassm.errors import UserError

TEXTS = [f"{n} d\u00e9j\u00e0 vu\r\n " * (1 + n % 23) for n in range(500)]


def read(path: Path, **options: object) -> list[str]:
    source = TextSource((path,), **options)  # type: ignore[arg-type]
    return list(read_documents(source, find_inputs(source).files, ReadCounts()))


def write_zst(path: Path, *frames: bytes) -> None:
    with open(path, "wb") as file:
        for frame in frames:
            packed = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(packed, "zstd") as stream:
                stream.write(frame)
            file.write(packed.getvalue())


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def lines_of(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(TEXTS[0].encode())
    write_zst(tmp_path / "b.jsonl.zst", lines_of(TEXTS[1:150]), lines_of(TEXTS[150:200]))
    parquet.write_table(pyarrow.table({"id": range(100), "text": TEXTS[200:300]}), tmp_path / "c.parquet")
    members = [(f"{n:05d}.txt", text.encode()) for n, text in enumerate(TEXTS[300:])]
    write_tar(tmp_path / "d.tar", members)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view(),
                                  pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])  # fmt: skip
def test_a_parquet_column_of_any_string_type(tmp_path: Path, kind: pyarrow.DataType) -> None:
    column = pyarrow.array(["one", None, "d\u00e9j\u00e0"]).cast(kind)
    parquet.write_table(pyarrow.table({"body": column}), tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path, text_field="body") == ["one", "d\u00e9j\u00e0"]


def test_a_data_set_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {
        "id": list(range(500)),
        "text": [*TEXTS[:-1], None],
        "meta": [{"n": n, "text": text} for n, text in enumerate(TEXTS)],
    }
    whole = datasets.Dataset.from_dict(rows)
    whole.save_to_disk(tmp_path / "saved", num_shards=3)
    assert read(tmp_path / "saved") == TEXTS[:-1]
    assert read(tmp_path / "saved", text_field="meta.text") == TEXTS
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == TEXTS[:-1] * 2
    with pytest.raises(UserError, match=r"arrow: no column 'no'; pass --text-field \(columns here: id, text, meta\)"):
        read(tmp_path / "saved", text_field="no")


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_damaged_arrow_file_is_refused(tmp_path: Path, is_stream: bool) -> None:
    table = pyarrow.table({"text": TEXTS})
    path = tmp_path / "a.arrow"
    new = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    assert read(path) == TEXTS
    raw = path.read_bytes()
    for cut in (9, 200, len(raw) // 2, len(raw) - 3000, len(raw) - 9, len(raw) - 8):  # the last: between two batches
        path.write_bytes(raw[:cut])
        with pytest.raises(UserError, match=r"a\.arrow: (damaged Arrow file|cut short|holds binary)"):
            read(path)


def test_parquet_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pyarrow.array([b"ok", b"a\xff"], pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": text, "n": [1, 2], "l": [["a"], ["b"]]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: row 2: byte 1 of the text: 0xff is not UTF-8"):
        read(path)
    assert read(path, on_bad_utf8="replace") == ["ok", "a\ufffd"]
    for field, message in (
        ("no", r"a\.parquet: no column 'no'; pass --text-field \(columns here: text, n, l\)"),
        ("n", r"column 'n' is int64, it must hold strings"),
        ("l", r"column 'l' is list<element: string>, it must hold strings"),
    ):
        with pytest.raises(UserError, match=message):
            read(path, text_field=field)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.parquet: damaged Parquet file"):
        read(path)


@pytest.mark.parametrize("cut_bytes", [1, 20, 300])
def test_a_cut_zst_file_is_refused(tmp_path: Path, cut_bytes: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    noise = np.random.default_rng(0).integers(0, 1 << 40, 500).tolist()
    write_zst(path, lines_of([str(number) for number in noise]))
    path.write_bytes(path.read_bytes()[:-cut_bytes])
    with pytest.raises(
        UserError, match=r"a\.jsonl\.zst: damaged zstd after \d+ bytes of its content: .*fetch the file again"
    ):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_without_pyarrow_its_formats_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes(b"PAR1" if name.endswith("parquet") else b"\x28\xb5\x2f\xfd")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = (
        r"reading \.\w+ needs pyarrow, which is not installed; pip install -e '\.\[arrow\]' in a checkout of MegaSSM"
    )
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)


def test_a_sample_of_a_tar_is_one_document(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.json", b'{"text": "in json"}'),
            ("x/1.jpg", b"\xff\xd8"),
            ("x/2.json", b'{"source": "metadata only"}'),
            ("x/2.txt", b"in txt"),
            ("x/3.TXT", b"upper case"),
            ("__meta__/4.txt", b"no sample"),
            (".txt", b"no sample"),
            ("long/" * 40 + "5.txt", b"a long name"),
        ],
    )
    assert read(tmp_path / "a.tar") == ["in json", "in txt", "upper case", "a long name"]


def test_tar_refusals(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [("1.txt", b"a"), ("2.txt", b"a\xff"), ("3.json", b"{")])
    with pytest.raises(UserError, match=r"a\.tar: 2\.txt: byte 1 of the member: 0xff is not UTF-8"):
        read(path)
    with pytest.raises(UserError, match=r"a\.tar: 3\.json: not JSON"):
        read(path, on_bad_utf8="skip")
    write_tar(path, [("1.u16", b"ab")])
    with pytest.raises(UserError, match=r"a\.tar: holds no text: .*tools/index_shards\.py"):
        read(path)


@pytest.mark.parametrize("size", [100, 512, 1023, 1024, 1536, 2048, 2500])
def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{n}.txt", b"content") for n in range(5)])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.tar: offset \d+: not a sound tar file"):
        list(tar_members(path))


@pytest.mark.parametrize("member", range(3))
def test_a_damaged_tar_header_is_refused(tmp_path: Path, member: int) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{n}.txt", b"content") for n in range(3)])
    raw = bytearray(path.read_bytes())
    raw[1024 * member + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=rf"a\.tar: offset {1024 * member}: not a sound tar file"):
        list(tar_members(path))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=6))
def test_offsets_of_members_are_where_their_headers_begin(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write_tar(path, [("d/" * 60 * (n % 2) + f"{n}.u16", content) for n, content in enumerate(contents)])
    members = list(tar_members(path))
    assert [member.data for member in members] == contents
    raw = path.read_bytes()
    for member, stop in zip(members, [*(m.offset for m in members[1:]), len(raw)], strict=True):
        with tarfile.open(fileobj=io.BytesIO(raw[member.offset : stop]), mode="r:") as tar:
            assert tar.getnames() == [member.name]


@pytest.mark.parametrize("name", ["a.txt", "v1.0/a.b.TXT", "./a.txt", "a/README", "__x__", "__x__/a.txt", "__a__.txt"])
def test_names_are_split_as_webdataset_splits_them(tmp_path: Path, name: str) -> None:
    import webdataset

    write_tar(tmp_path / "a.tar", [(name, b"x"), ("last.one", b"y")])
    samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    expected = [(key, suffix) for s in samples[:-1] for key in [s["__key__"]] for suffix in s if suffix[:2] != "__"]
    assert ([split_name(name)] if split_name(name)[0] else []) == expected
