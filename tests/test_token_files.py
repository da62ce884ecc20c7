"""Token ids and samples in the formats of others: nothing is lost, nothing is guessed.

`token_samples.tar.xz` holds what mosaicml-streaming 0.13.0, litdata 0.2.76 and megatron-core 0.16.1 wrote of the
documents in its texts.json; its make.py is how. nanoGPT and llm.c have no package: their files are written here.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.cli.progress import LineProgress
from megassm.data.blocks import local_fetch, read_block
from megassm.data.prepare import ids as ids_module
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.ids import IdFacts, IdRun, documents_of_ids
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.pipeline import Prepared, PrepareJob, prepare
from megassm.data.prepare.source import TextSource
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.errors import UserError
from tests.archives import unpack
from tests.conftest import run_python

EOD = BytesTokenizer.eod
FACTS = IdFacts(EOD, BytesTokenizer.vocab_size)
TEXTS = [f"{n} one\n" * (1 + n % 3) for n in range(30)]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    unpack(Path(__file__).with_name("token_samples.tar.xz"), folder)
    return folder / "samples"


def prepared(path: Path, output: Path, **options: object) -> Prepared:
    return prepare(PrepareJob(TextSource((path,), **options), output), LineProgress())  # type: ignore[arg-type]


def ids_in(done: Prepared) -> list[list[int]]:
    """The documents of both splits, sorted."""
    found: list[list[int]] = []
    for shards in done.splits.values():
        fetch = local_fetch(shards.directory)
        ids = np.concatenate([read_block(shards, block, fetch) for block in range(len(shards.blocks))]).astype(int)
        assert ids[-1] == EOD
        documents = [part[part != EOD].tolist() for part in np.split(ids, np.flatnonzero(ids == EOD) + 1)[:-1]]
        assert (shards.documents, shards.text_bytes) == (len(documents), sum(map(len, documents)))
        found += documents
    return sorted(found)


def ids_of(texts: list[str]) -> list[list[int]]:
    return sorted(list(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mds_text", {}),
        ("mds_zstd", {}),
        ("mds_gz", {}),
        ("mds_array", {"text_field": "tokens"}),
        ("mds_any_array", {"text_field": "tokens"}),
        ("mds_bytes", {"text_field": "tokens", "format": "i64"}),
        ("litdata_tokens", {}),
        ("litdata_arrays", {}),
        ("litdata_text", {}),
        ("litdata_dict", {}),
        ("litdata_ids", {"text_field": "input_ids"}),
        ("litdata_rows", {"text_field": "input_ids"}),
        ("litdata_zstd", {}),
        ("megatron/with_end.bin", {}),
        ("megatron/without_end.bin", {}),
        ("megatron/sentences.bin", {}),
    ],
)
def test_what_the_packages_wrote(samples: Path, tmp_path: Path, name: str, options: dict[str, object]) -> None:
    texts = json.loads((samples / "texts.json").read_text())
    done = prepared(samples / name, tmp_path / "set", **options)
    assert ids_in(done) == ids_of(texts)
    assert not any(done.filtered.values())
    assert "left out" not in (tmp_path / "set" / "dataset.md").read_text()


def test_a_folder_of_pairs_is_read_once(samples: Path, tmp_path: Path) -> None:
    texts = json.loads((samples / "texts.json").read_text())
    assert ids_in(prepared(samples / "megatron", tmp_path / "set")) == ids_of(3 * texts)


def test_documents_go_on_in_the_next_sample(samples: Path, tmp_path: Path) -> None:
    folder, options = samples / "mds_chunks", {"text_field": "tokens"}
    with pytest.raises(UserError, match=r"sample \d+: holds an end of document.*pass --samples chunks"):
        prepared(folder, tmp_path / "set", **options)
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    texts = json.loads((samples / "texts.json").read_text())
    stream = b"".join(text.encode() + b"\0" for text in texts)
    whole = len(stream) // 16 * 16  # what was written
    found = ids_in(prepared(folder, tmp_path / "set", samples="chunks", **options))
    shards = sorted(folder.glob("*.mds"))
    assert sorted(i for ids in found for i in ids) == sorted(stream[:whole].replace(b"\0", b""))
    # One document may be divided where a shard ends, none anywhere else.
    assert len(texts) <= len(found) <= len(texts) + len(shards)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mds_br", {}, r"mds_br/index\.json: its shards are packed with br, which is not read; unpack them"),
        ("litdata_within", {}, r"compressed within the chunks, which is not read; write them with .*'chunk'"),
        ("mds_array", {}, r"shard\.00000\.mds: no column 'text'; pass --text-field \(columns here: a, tokens\)"),
        ("mds_text", {"text_field": "m"}, r"column 'm' must hold text or whole numbers"),
        ("litdata_dict", {"text_field": "n"}, r"column 'n' must hold text or whole numbers"),
        (
            "mds_bytes",
            {"text_field": "tokens", "format": "u16", "min_document_bytes": 3},
            r"count bytes of text; leave",
        ),
    ],
)
def test_refusals(samples: Path, tmp_path: Path, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared(samples / name, tmp_path / "set", **options)


@pytest.mark.parametrize("name", ["mds_text", "litdata_tokens"])
def test_a_list_and_its_shards_belong_together(samples: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(samples / name, folder)
    [first, second, *_] = sorted(path for path in folder.iterdir() if path.name != "index.json")
    shutil.copy(first, folder / f"stale-{first.name}")
    prepared(folder, tmp_path / "set")
    left_out = (tmp_path / "set" / "dataset.md").read_text()
    assert f"1 not in the index.json beside them (such as {folder}/stale-{first.name})" in left_out
    first.unlink()
    with pytest.raises(UserError, match=rf"{first.name}: no such file, and index\.json beside it names it"):
        prepared(folder, tmp_path / "other")
    shutil.copy(folder / f"stale-{first.name}", first)
    second.write_bytes(second.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"{second.name}: "):
        prepared(folder, tmp_path / "other")


def test_packed_and_unpacked_shards_are_read_once(samples: Path, tmp_path: Path) -> None:
    import gzip

    folder = tmp_path / "both"
    shutil.copytree(samples / "mds_gz", folder)
    for packed in list(folder.glob("*.gz")):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    texts = json.loads((samples / "texts.json").read_text())
    assert ids_in(prepared(folder, tmp_path / "set")) == ids_of(texts)


def stream_of(texts: list[str], begins: bool, dtype: str) -> npt.NDArray[np.integer]:
    """As nanoGPT (EOD ends a document) or llm.c (it begins one) writes them."""
    parts = [[EOD, *text.encode()] if begins else [*text.encode(), EOD] for text in texts]
    return np.array([i for part in parts for i in part], dtype=dtype)


@pytest.mark.parametrize(("kind", "dtype"), [("u16", "<u2"), ("u32", "<u4"), ("i64", "<i8")])
def test_flat_files(tmp_path: Path, kind: str, dtype: str) -> None:
    stream_of(TEXTS, False, dtype).tofile(tmp_path / "ids.bin")
    with pytest.raises(UserError, match=r"holds no file named"):
        prepared(tmp_path, tmp_path / "set")
    with pytest.raises(UserError, match=r"ids\.bin: (holds binary data|is UTF-16).*"):
        prepared(tmp_path / "ids.bin", tmp_path / "set")
    assert ids_in(prepared(tmp_path, tmp_path / "set", format=kind)) == ids_of(TEXTS)


def test_official_splits_of_flat_files_are_asked_for(tmp_path: Path) -> None:
    for name, texts in (("train", TEXTS), ("val", TEXTS[:3])):
        stream_of(texts, False, "<u2").tofile(tmp_path / f"{name}.bin")
    with pytest.raises(UserError, match="names say that they are split already"):
        prepared(tmp_path, tmp_path / "set", format="u16")
    done = prepared(tmp_path, tmp_path / "set", format="u16", valid_inputs=(tmp_path / "val.bin",))
    assert {name: shards.documents for name, shards in done.splits.items()} == {"train": 30, "valid": 3}


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_files_of_llm_c(tmp_path: Path, magic: int, version: int, dtype: str) -> None:
    ids = stream_of(TEXTS, True, dtype)
    head = struct.pack("<256i", magic, version, ids.size, *[0] * 253)
    (tmp_path / "fineweb_000001.bin").write_bytes(head + ids.tobytes())
    assert ids_in(prepared(tmp_path, tmp_path / "set")) == ids_of(TEXTS)
    (tmp_path / "fineweb_000001.bin").write_bytes(head + ids.tobytes()[:-2])
    with pytest.raises(UserError, match=r"its header says \d+ ids of . bytes, and \d+ bytes follow"):
        prepared(tmp_path, tmp_path / "other")


def test_a_flat_file_of_one_document_is_divided_by_position(tmp_path: Path) -> None:
    ids = np.arange(10_000, dtype="<u2") % 250  # nanoGPT's Shakespeare has no end of document
    ids.tofile(tmp_path / "a.bin")
    done = prepared(tmp_path / "a.bin", tmp_path / "set", format="u16")
    sides = {name: shards.tokens for name, shards in done.splits.items()}
    assert sides == {"train": 9501, "valid": 501}
    assert sorted(map(len, ids_in(done))) == [500, 9500]


def test_ids_are_no_text_for_a_tokenizer(tmp_path: Path) -> None:
    stream_of(TEXTS, False, "<u2").tofile(tmp_path / "a.bin")
    source = TextSource((tmp_path,), format="u16")
    with pytest.raises(UserError, match="holds token ids, and text is wanted here"):
        list(read_documents(source, find_inputs(source).files, ReadCounts()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([1, 300], dtype="<u2").tobytes(), r"ids 1 to 300 leave the vocabulary \[0, 257\)"),
        (b"\1\0\2", r"3 bytes are no whole number of ids of 2 bytes"),
    ],
)
def test_flat_refusals(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path / "a.bin", tmp_path / "set", format="u16")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (9, b"\2", r"version 2, numbers of kind 8"),
        (17, b"\6", r"numbers of kind 6"),
        (18, b"\x10", r"with_end\.idx: damaged index: \d+ bytes, \d+ are expected"),
        (34, b"\1", r"sequences from 0 on do not stand end to end"),
        (-8, b"\2", r"the documents from 0 on are not in order|22 sequences are in no document"),
        (0, b"TNTIDX\0\0", r"its index is of the kind that Megatron-LM called lazy"),
    ],
)
def test_an_index_of_megatron_that_is_none(
    samples: Path, tmp_path: Path, place: int, value: bytes, message: str
) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(samples / "megatron" / f"with_end.{suffix}", tmp_path)
    changed = bytearray((tmp_path / "with_end.idx").read_bytes())
    place %= len(changed)
    changed[place : place + len(value)] = value
    (tmp_path / "with_end.idx").write_bytes(changed)
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, tmp_path / "set")


@settings(deadline=None, max_examples=200)
@given(
    ids=st.lists(st.sampled_from([1, 2, EOD]), max_size=40),
    run=st.integers(1, 9),
    piece=st.integers(1, 9),
    ends=st.sets(st.integers(1, 40)),
)
def test_documents_are_what_stands_between_their_ends(ids: list[int], run: int, piece: int, ends: set[int]) -> None:
    """As a plain loop divides them, whatever the runs and pieces."""
    expected, current = [], []
    for place, one in enumerate(ids, start=1):
        if one != EOD:
            current.append(one)
        if (one == EOD and place > 1) or place in ends:
            expected.append(current)
            current = []
    if current:
        expected.append(current)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids_module, "PIECE_IDS", max(run, piece))
        runs = [
            IdRun(np.array(ids[start : start + run]), start, np.array(
                sorted(end - start for end in ends if start < end <= min(start + run, len(ids))), dtype=np.int64))
            for start in range(0, len(ids), run)
        ]  # fmt: skip
        found: list[list[int]] = []
        for raw in documents_of_ids(Path("x"), runs, FACTS):
            if raw.starts:
                found.append([])
            assert len(raw.content) // 4 <= max(run, piece)
            found[-1] += np.frombuffer(raw.content, dtype="<u4").tolist()
            assert raw.content or (raw.starts and raw.ends)
    assert found == expected


def test_the_tool(samples: Path, tmp_path: Path) -> None:
    report = tmp_path / "told.json"
    options = ("--input", str(samples / "megatron" / "with_end.bin"), "--output", str(tmp_path / "set"))
    run_python("tools/prepare_data.py", *options, "--json", str(report))
    texts = json.loads((samples / "texts.json").read_text())
    assert sum(row["documents"] for row in json.loads(report.read_text())) == len(texts)
    assert run_python("tools/verify_data.py", str(tmp_path / "set"), "--samples", "1").returncode == 0
