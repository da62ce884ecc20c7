"""Shards made elsewhere: indexed as they are, they give the same ids as the writer of the tar put there."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.cli.progress import LineProgress
from megassm.config.schema import Config
from megassm.data.blocks import local_fetch, read_block
from megassm.data.dataset import open_dataset
from megassm.data.index import ShardSet, load_index
from megassm.data.prepare import workers as workers_module
from megassm.data.prepare.foreign import IndexJob, index_shards
from megassm.data.prepare.verify import verify
from megassm.data.stream import StreamPlan, validation_batches
from megassm.data.tokenizer.base import BytesTokenizer, TokenizerSpec
from megassm.errors import UserError
from tests.conftest import run_python
from tests.shard_sets import edit_index, random_documents, write_documents
from tests.test_formats import write_tar
from tests.test_hugging_face_tokenizer import gpt2_like

Ids = npt.NDArray[np.int64]
EOD = BytesTokenizer.eod


def packed(ids: Ids, suffix: str) -> bytes:
    if suffix.endswith("npy"):
        file = io.BytesIO()
        np.save(file, ids)
        return file.getvalue()
    return ids.astype("<u2" if suffix == "u16" else "<u4").tobytes()


def write_shards(directory: Path, members: list[Ids], suffix: str, per_shard: int = 20) -> None:
    """Samples of metadata, ids and a picture, `per_shard` to a tar."""
    directory.mkdir(parents=True, exist_ok=True)
    for shard in range(0, len(members), per_shard):
        entries = []
        for n, ids in enumerate(members[shard : shard + per_shard], start=shard):
            contents = {"json": b"{}", suffix: packed(ids, suffix), "jpg": b"\xff\xd8"}
            entries += [(f"some/sample-{n:06d}.{name}", content) for name, content in contents.items()]
        write_tar(directory / f"theirs-{shard:04d}.tar", entries)


def index(directory: Path, **options: object) -> ShardSet:
    job = IndexJob(directory, TokenizerSpec(), **options)  # type: ignore[arg-type]
    return index_shards(job, LineProgress())


def read_all(shards: ShardSet) -> list[int]:
    fetch = local_fetch(shards.directory)
    return [i for block in range(len(shards.blocks)) for i in read_block(shards, block, fetch).tolist()]


def closed(documents: list[Ids]) -> list[int]:
    return [i for ids in documents for i in [*ids.tolist(), EOD]]


@pytest.mark.parametrize("suffix", ["u16", "u32", "npy", "tokens.npy"])
@pytest.mark.parametrize("with_eod", [False, True])
def test_one_document_a_sample(tmp_path: Path, suffix: str, with_eod: bool) -> None:
    documents = random_documents(70)
    members = [np.append(ids, EOD) for ids in documents] if with_eod else documents
    write_shards(tmp_path, members, suffix)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shards = index(tmp_path, block_tokens=300)
    assert read_all(shards) == closed(documents)
    assert (shards.tokens, shards.documents) == (len(closed(documents)), 70)
    assert shards.text_bytes == sum(ids.size for ids in documents)
    assert [shard.name for shard in shards.shards] == sorted(before)
    assert len(shards.blocks) > len(shards.shards) == 4
    assert verify(shards) == []
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"index.json", "index.npz"}


def test_the_index_does_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "WORTH_A_PROCESS_BYTES", 1)
    for workers in (1, 3):
        write_shards(tmp_path / str(workers), random_documents(70), "u16")
        index(tmp_path / str(workers), block_tokens=300, workers=workers)
    for name in ("index.json", "index.npz"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    block_tokens=st.integers(1, 100),
    per_shard=st.integers(1, 30),
)
def test_chunks_are_read_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block_tokens: int, per_shard: int
) -> None:
    directory = tmp_path_factory.mktemp("chunks")
    chunks = [np.arange(length) % 5 + EOD - 4 for length in lengths]  # every fifth id is EOD
    firsts = range(0, len(chunks), per_shard)
    chunks = [np.append(ids, 7) if n in firsts else ids for n, ids in enumerate(chunks)]  # no shard without ids
    write_shards(directory, chunks, "u16", per_shard)
    shards = index(directory, members="chunks", block_tokens=block_tokens)
    assert read_all(shards) == np.concatenate(chunks).tolist()
    assert shards.documents == np.count_nonzero(np.concatenate(chunks) == EOD)
    assert verify(shards) == []


def test_training_reads_them_like_our_own(tmp_path: Path) -> None:
    documents = random_documents(70)
    write_shards(tmp_path / "theirs", documents, "npy")
    theirs, ours = index(tmp_path / "theirs"), write_documents(tmp_path / "ours", documents)
    plan = StreamPlan(seq_len=16, batch_sequences=4, micro_batch_sequences=4, seed=0)
    batches = (list(validation_batches(shards, plan, 10_000)) for shards in (theirs, ours))
    for left, right in zip(*batches, strict=True):
        assert np.array_equal(left.ids_BT, right.ids_BT)
        assert np.array_equal(left.mask_BL, right.mask_BL)


def test_shards_of_our_own_get_their_index_back(tmp_path: Path) -> None:
    ours = write_documents(tmp_path, random_documents(70))
    for name in ("index.json", "index.npz"):
        (tmp_path / name).unlink()
    again = index(tmp_path, block_tokens=400)
    assert (again.tokens, again.documents, again.text_bytes) == (ours.tokens, ours.documents, ours.text_bytes)
    assert again.shards == ours.shards
    assert again.blocks.tolist() == ours.blocks.tolist()


@pytest.mark.parametrize(
    ("members", "suffix", "options", "message"),
    [
        ([], "u16", {}, r"holds no \*\.tar; a shard must be an unpacked tar file"),
        ([np.array([1, 300])], "u16", {}, r"theirs-0000\.tar: offset 1024: .*000\.u16: ids 1 to 300 leave the vocab"),
        ([np.array([-1, 3])], "npy", {}, r"sample-000000\.npy: ids -1 to 3 leave the vocabulary \[0, 257\)"),
        ([np.array([[1], [3]])], "npy", {}, r"int64 of shape \(2, 1\); it must be integers in one dimension"),
        ([np.array([0.5])], "npy", {}, r"float64 of shape \(1,\); it must be integers in one dimension"),
        ([np.array([1, EOD, 2])], "u16", {}, r"does not end with one; pass --members chunks if documents go on"),
        ([np.array([1])], "txt", {}, r"first sample holds \.json, \.txt, \.jpg; say with --suffix .*u16, u32, npy"),
        ([np.array([1])], "u16", {"suffix": "npy"}, r"holds no ids in members named \*\.npy"),
        ([np.array([1])], "u16", {"suffix": "txt"}, r"suffix 'txt': ids are read from u16, u32, npy or NAME\.npy"),
        ([np.array([1])], "u16", {"block_tokens": 0}, r"block_tokens is 0, it must be at least 1"),
    ],
)
def test_refusals(tmp_path: Path, members: list[Ids], suffix: str, options: dict[str, object], message: str) -> None:
    write_shards(tmp_path, members, suffix)
    with pytest.raises(UserError, match=message):
        index(tmp_path, **options)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_cut_shard_and_a_second_index_are_refused(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "WORTH_A_PROCESS_BYTES", 1)
    write_shards(tmp_path, random_documents(50), "u16")
    path = tmp_path / "theirs-0020.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 * 12])
    with pytest.raises(UserError, match=r"theirs-0020\.tar: offset \d+: not a sound tar file: .*cut short"):
        index(tmp_path, workers=workers)
    path.write_bytes(whole)
    index(tmp_path, workers=workers)
    with pytest.raises(UserError, match=r"has an index\.json already; check it with tools/verify_data\.py"):
        index(tmp_path, workers=workers)


def test_two_members_of_ids_in_one_sample_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.u16", b"ab"), ("1.npy", b"")])
    with pytest.raises(UserError, match=r"first sample holds \.u16, \.npy; say with --suffix"):
        index(tmp_path)
    write_tar(tmp_path / "a.tar", [("1.u16", b"a\0"), ("1.U16", b"b\0")])
    with pytest.raises(UserError, match=r"a\.tar: offset 1024: 1\.U16: a second \.u16 in one sample"):
        index(tmp_path, suffix="u16")


def test_a_layout_that_is_none_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, random_documents(5), "u16")
    index(tmp_path)
    edit_index(tmp_path, lambda described: described.update(members="other"))
    with pytest.raises(UserError, match="damaged index"):
        load_index(tmp_path)
    edit_index(tmp_path, lambda described: described.update(members="chunks"))
    with pytest.raises(UserError, match=r"theirs-0000\.tar, block at offset 1024: .*expected tokens \d+, got \d+"):
        read_block(load_index(tmp_path), 0, local_fetch(tmp_path))


def test_a_run_opens_them_with_the_tokenizer_that_was_given(
    tmp_path: Path, small_config: Callable[..., Config]
) -> None:
    backend = gpt2_like(["some words of text"] * 9)
    backend.add_special_tokens(["<|stop|>"])
    backend.save(str(tmp_path / "theirs.json"))
    texts = [f"text {n} of some words" for n in range(60)]
    directory = tmp_path / "set"
    for split in ("train", "valid"):
        write_shards(directory / split, [np.array(backend.encode(text).ids) for text in texts], "u16")
    command = ("tools/index_shards.py", str(directory), "--tokenizer", str(tmp_path / "theirs.json"))
    (directory / "tokenizer.json").write_text("{}")
    refused = run_python(*command, "--eod-token", "<|stop|>", check=False)
    assert refused.returncode == 1
    assert f"{directory / 'tokenizer.json'}: is not the tokenizer of these shards" in refused.stderr
    assert [path.read_text() for path in directory.iterdir() if path.is_file()] == ["{}"]
    assert not list(directory.glob("*/index.*"))
    (directory / "tokenizer.json").write_bytes((tmp_path / "theirs.json").read_bytes())
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    refused = run_python(*command, "--eod-token", "<|stop|>", check=False)
    assert "or ends documents with another token" in refused.stderr
    (directory / "tokenizer_config.json").unlink()
    run_python(*command, "--eod-token", "<|stop|>")

    dataset = open_dataset(small_config(f"data.path={directory}", "model.vocab_size=600"))
    assert dataset.tokenizer.eod == dataset.train.eod == backend.token_to_id("<|stop|>")
    ids = np.array(read_all(dataset.train.sources[0].shards))
    assert ids.size == dataset.train.tokens == sum(len(backend.encode(text).ids) + 1 for text in texts)
    assert dataset.tokenizer.decode(ids.tolist()) == "".join(texts)
    assert dataset.token_bytes(600)[ids].sum() == dataset.train.sources[0].shards.text_bytes == sum(map(len, texts))


def test_the_tool(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        write_shards(tmp_path / "set" / split, random_documents(50), "u16")
    table = tmp_path / "table.json"
    command = ("tools/index_shards.py", str(tmp_path / "set"), "--tokenizer", "bytes", "--json", str(table))
    run_python(*command)
    rows = json.loads(table.read_text())
    assert [(Path(row["data_set"]).name, row["documents"]) for row in rows] == [("train", 50), ("valid", 50)]
    (tmp_path / "set" / "valid" / "index.json").unlink()
    run_python(*command)
    assert len(json.loads(table.read_text())) == 1
    refused = run_python(*command, check=False)
    assert refused.returncode == 1
    assert "train: has an index.json already" in refused.stderr
    empty = run_python(command[0], str(tmp_path), *command[2:], check=False)
    assert "holds no *.tar, and train/, valid/ neither; give the directory of a data set" in empty.stderr
    assert "\nexample:\n  python tools/index_shards.py" in run_python(command[0], "--help").stdout
