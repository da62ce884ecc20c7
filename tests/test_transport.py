"""Fetching: the same bytes through every fault, a refusal where there is no way, and never a secret in a message."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megassm.data import http, request
from megassm.data.blocks import FETCHES, BlockReader, DamagedBlockError
from megassm.data.index import ShardSet, load_index
from megassm.data.mixture import DataSource, Mixture, MixturePhase, ReadOptions, one_source
from megassm.data.request import BrokenFetchError, ByteRange, Reply, Store
from megassm.data.signature import query_for
from megassm.data.stores import FsspecStore, HttpStore, LinkedStore, LocalStore, open_store
from megassm.data.stream import StreamPlan, TokenStream
from megassm.data.transport import DataCounters, Meter, Patience, Transport, read_file, total_counters
from megassm.errors import UserError
from tests.fault_server import Fault, FaultServer, serving
from tests.shard_sets import random_documents, write_documents

QUICK = Patience(deadline_s=10.0, first_wait_s=0.001, longest_wait_s=0.01)
SECRET = "X-Signature=s3cr3t"
FAULTS: tuple[Fault, ...] = ("fin", "rst", "503", "stall", "cut", "slow", "shifted")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_documents(tmp_path_factory.mktemp("served") / "set", random_documents(200))


@pytest.fixture
def server(local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    for module in (request, http):
        monkeypatch.setattr(module, "READ_S", 0.3)
    with serving(local.directory.parent) as server:
        yield server


@pytest.fixture
def remote(server: FaultServer) -> ShardSet:
    return load_index(open_store(f"{server.url}/set"))


def reader(shards: ShardSet, meter: Meter | None = None, patience: Patience = QUICK) -> BlockReader:
    meter = meter or Meter()
    return BlockReader(shards, Transport(shards.store, patience, meter).fetch, None, meter)


def read_all(shards: ShardSet, meter: Meter | None = None) -> list[int]:
    read = reader(shards, meter).read
    return np.concatenate([read(block) for block in range(len(shards.blocks))]).tolist()


def test_an_index_read_over_http_is_the_local_one(local: ShardSet, remote: ShardSet, server: FaultServer) -> None:
    assert remote.fingerprint == local.fingerprint
    assert np.array_equal(remote.blocks, local.blocks)
    assert read_all(remote) == read_all(local)
    shard_requests = [headers for path, headers in server.requests if path.endswith(".tar")]
    assert len(shard_requests) == len(local.blocks), "one request a block"
    assert all("Range" in headers for headers in shard_requests)
    assert "If-Match" in shard_requests[1]


def test_the_block_index_is_kept_under_its_hash(remote: ShardSet, server: FaultServer) -> None:
    server.requests.clear()
    assert load_index(remote.store).fingerprint == remote.fingerprint
    assert [path for path, _ in server.requests] == ["/set/index.json"]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_same_bytes_through_a_fault(local: ShardSet, remote: ShardSet, server: FaultServer, fault: Fault) -> None:
    meter = Meter()
    server.faults.extend([fault] * 3)
    assert read_all(remote, meter) == read_all(local)
    counted = meter.take()
    assert not server.faults
    assert counted.data_reconnects == (0 if fault == "slow" else 3)
    assert counted.data_refetches == 0
    if fault in ("fin", "rst", "stall", "cut"):  # it goes on at the byte reached
        assert counted.data_fetched_bytes == local.blocks["size"].sum()


def test_a_training_stream_through_all_faults_at_once(local: ShardSet, remote: ShardSet, server: FaultServer) -> None:
    plan = StreamPlan(seq_len=10, batch_sequences=48, micro_batch_sequences=48, seed=7)
    server.faults.extend((*FAULTS, "flip", *FAULTS, "flip", *FAULTS))  # fewer flips than one block has fetches
    whole = (MixturePhase(0, {"data": 1.0}),)
    stream = TokenStream(Mixture((DataSource("data", remote),), whole, ReadOptions(QUICK)), plan)
    steps = 2 * len(stream.mixture.sources[0].shards.blocks)
    for got, expected in zip(stream.batches(0, steps), TokenStream(local, plan).batches(0, steps), strict=True):
        assert np.array_equal(got.ids_BT, expected.ids_BT)
        assert np.array_equal(got.mask_BL, expected.mask_BL)
    counted = stream.meter.take()
    assert not server.faults
    assert counted.data_reconnects >= 18
    assert counted.data_refetches == 2
    assert counted.data_wait_s > 0


def test_damage_on_the_way_is_fetched_again_and_lasting_damage_raised(remote: ShardSet, server: FaultServer) -> None:
    meter = Meter()
    server.faults.extend(["flip"] * (FETCHES - 1))
    read = reader(remote, meter).read
    first = read(0)
    assert meter.take().data_refetches == FETCHES - 1
    server.faults.extend(["flip"] * FETCHES)
    with pytest.raises(DamagedBlockError, match=r"/set/shard-00000\.tar, block at offset 0: damaged: expected CRC32"):
        read(0)
    assert np.array_equal(read(0), first)


def test_a_shard_that_is_shorter_or_gone(local: ShardSet, remote: ShardSet, server: FaultServer) -> None:
    path, last = local.directory / local.shards[-1].name, len(local.blocks) - 1
    offset, size = int(local.blocks[last]["offset"]), int(local.blocks[last]["size"])
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[: offset + 512])
        with pytest.raises(UserError, match=rf"{path.name}, block at offset {offset}: .*bytes {size}, got 512"):
            reader(remote).read(last)
        path.write_bytes(whole[:offset])
        with pytest.raises(UserError, match=rf"{path.name}, block at offset {offset}: .*bytes {size}, got 0"):
            reader(remote).read(last)
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}: no such file, expected {size} bytes at offset {offset}"):
            reader(remote).read(last)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_folder_that_goes_away_for_a_while_is_waited_for(
    where: str, local: ShardSet, remote: ShardSet, tmp_path: Path
) -> None:
    """A mount that hangs, a server whose disk does: what is missing is not damaged, and not passed over."""
    plan = StreamPlan(seq_len=10, batch_sequences=48, micro_batch_sequences=48, seed=7)
    expected = list(TokenStream(local, plan).batches(0, 6))
    shards = local if where == "local" else remote
    stream = TokenStream(one_source(shards, ReadOptions(QUICK, on_bad_block="mask")), plan)
    local.directory.rename(tmp_path / "away")
    back = threading.Timer(0.3, lambda: (tmp_path / "away").rename(local.directory))
    back.start()
    try:
        for got, true in zip(stream.batches(0, 6), expected, strict=True):
            assert np.array_equal(got.ids_BT, true.ids_BT)
            assert np.array_equal(got.mask_BL, true.mask_BL)
        counted = stream.meter.take()
        assert counted.data_reconnects
        assert not counted.data_masked_samples
        local.directory.rename(tmp_path / "away")
        stream = TokenStream(one_source(shards, ReadOptions(Patience(0.05, 0.001, 0.01), on_bad_block="mask")), plan)
        with pytest.raises(UserError, match=r"given up \(no such file\); look at the server or the disk") as error:
            list(stream.batches(0, 6))
        assert not isinstance(error.value, DamagedBlockError)
        assert str(error.value).startswith(shards.store.place)
    finally:
        back.join()
        if not local.directory.exists():
            (tmp_path / "away").rename(local.directory)


def test_a_replaced_shard_is_refused_by_name(local: ShardSet, remote: ShardSet, server: FaultServer) -> None:
    path = local.directory / local.shards[0].name
    whole = path.read_bytes()
    read = reader(remote).read
    read(0)
    try:
        path.write_bytes(whole + bytes(512))
        with pytest.raises(UserError, match=r"set/shard-00000\.tar, at offset \d+: the file was replaced while"):
            read(1)
    finally:
        path.write_bytes(whole)


def test_a_server_without_ranges_is_refused(remote: ShardSet, server: FaultServer) -> None:
    server.faults.append("whole")
    with pytest.raises(UserError, match=r"shard-00000\.tar: the server ignores Range \(HTTP 200 instead of 206\)"):
        reader(remote).read(0)


def test_the_deadline_ends_a_fetch_and_names_it(remote: ShardSet, server: FaultServer) -> None:
    server.faults.extend(["503"] * 10_000)
    started = time.monotonic()
    patience = Patience(deadline_s=0.3, first_wait_s=0.01, longest_wait_s=0.05)
    with pytest.raises(UserError, match=r"shard-00000\.tar, at offset 0: 0 bytes came within 0\.3 s.*HTTP 503"):
        reader(remote, patience=patience).read(0)
    assert time.monotonic() - started < 5
    assert 5 < 10_000 - len(server.faults) < 200, "it neither gave up at once nor hammered"


def test_a_batch_that_takes_too_long_is_an_error(remote: ShardSet, server: FaultServer) -> None:
    server.faults.extend(["503"] * 10_000)
    reading = ReadOptions(Patience(60.0, 0.05, 0.1), batch_wait_s=0.2)
    mixture = Mixture((DataSource("data", remote),), (MixturePhase(0, {"data": 1.0}),), reading)
    with pytest.raises(UserError, match=r"no batch of data within 0\.2 s \(part of parallel\.timeout_s\)"):
        next(TokenStream(mixture, StreamPlan(10, 4, 4, seed=0)).batches(0, 1))
    server.faults.clear()  # lets the thread end


def test_no_server_at_all() -> None:
    store = HttpStore(f"http://127.0.0.1:9/set?{SECRET}")
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9/set/index\.json, at offset 0: .*\(no connection\)"
    ) as told:
        read_file(store, "index.json", Patience(0.2, 0.01, 0.05))
    assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize("fault", ["403", "404", "503", "whole", "flip"])
def test_a_signature_is_sent_and_never_told(
    local: ShardSet, server: FaultServer, fault: Fault, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url.replace("http://", "http://me:pa55word@")
    signed = load_index(open_store(f"{url}/set?{SECRET}"))
    assert signed.fingerprint == local.fingerprint
    server.faults.extend([fault] * 1000)
    with pytest.raises(UserError) as told:
        reader(signed, patience=Patience(0.2, 0.01, 0.02)).read(0)
    path, headers = server.requests[-1]
    assert path == f"/set/shard-00000.tar?{SECRET}"
    assert headers["Authorization"].startswith("Basic ")
    for text in (str(told.value), *traceback.format_exception(told.value), *capsys.readouterr(), signed.store.place):
        assert "s3cr3t" not in text
        assert "pa55word" not in text
    if fault == "403":
        assert "access denied (HTTP 403): wrong or expired credentials; renew" in str(told.value)


def test_the_signature_may_stand_in_the_environment(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASSM_DATA_QUERY", f"other.host?sig=x {server.url}?{SECRET}")
    load_index(open_store(f"{server.url}/set"))
    assert server.requests[0][0] == f"/set/index.json?{SECRET}"


@pytest.mark.parametrize(
    ("variable", "query"),
    [
        ("host?a=1", "a=1"),
        ("HOST/data?a=1", "a=1"),
        ("https://host/data/set?a=1&b=?", "a=1&b=?"),
        ("other?b=2 host/data/?a=1", "a=1"),
        ("host.evil.org?a=1", ""),
        ("ost?a=1", ""),
        ("host:8443?a=1", ""),
        ("http://host?a=1", ""),
        ("host/dat?a=1", ""),
        ("", ""),
    ],
)
def test_a_query_goes_to_the_server_that_it_names(variable: str, query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASSM_DATA_QUERY", variable)
    assert query_for("https://user@host/data/set") == query


@pytest.mark.parametrize("variable", [f"sig={SECRET}", f"?{SECRET}", SECRET, f"host?a=1 sig={SECRET}", "host?"])
def test_a_query_that_names_no_server_is_sent_to_none(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASSM_DATA_QUERY", variable)
    with pytest.raises(UserError, match="does not say which server its query is for") as told:
        open_store("https://host/set")
    assert SECRET not in str(told.value)


def test_a_list_of_links(local: ShardSet, server: FaultServer, tmp_path: Path) -> None:
    names = [path.name for path in local.directory.iterdir()]
    links = {f"train/{name}": f"{server.url}/set/{name}?{SECRET}{name}" for name in names}
    (tmp_path / "links.json").write_text(json.dumps(links))
    store = open_store(str(tmp_path / "links.json"))
    assert isinstance(store, LinkedStore)
    assert read_all(load_index(store.child("train"))) == read_all(local)
    assert all(SECRET in path for path, _ in server.requests)
    with pytest.raises(UserError, match=r"links\.json/valid/index\.json: no such file"):
        load_index(store.child("valid"))
    (tmp_path / "links.json").write_text("[1]")
    with pytest.raises(UserError, match=r"links\.json: not a list of links"):
        open_store(str(tmp_path / "links.json"))


def test_schemes(local: ShardSet) -> None:
    for spec in (str(local.directory), f"file://{local.directory}"):
        assert load_index(open_store(spec)).fingerprint == local.fingerprint
    with pytest.raises(UserError, match=r"nosuch://bucket/x: fsspec cannot read nosuch:// here"):
        open_store("nosuch://bucket/x")


def test_fsspec_reads_any_other_scheme(local: ShardSet) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in local.directory.iterdir():
        memory.pipe(f"/bucket/set/{path.name}", path.read_bytes())
    store: Store = open_store("memory://bucket/set")
    assert isinstance(store, FsspecStore)
    remote = load_index(store)
    assert read_all(remote) == read_all(local)
    memory.rm(f"/bucket/set/{local.shards[0].name}")
    with pytest.raises(UserError, match=r"memory://bucket/set/shard-00000\.tar: no such file"):
        reader(remote).read(0)


def test_a_local_file_that_cannot_be_read_is_tried_again(local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]
    request = LocalStore.request

    def flaky(self: LocalStore, name: str, span: ByteRange, etag: str | None) -> Reply:
        if failures:
            raise BrokenFetchError(failures.pop().strerror)
        return request(self, name, span, etag)

    monkeypatch.setattr(LocalStore, "request", flaky)
    meter = Meter()
    assert reader(local, meter).read(0).size
    assert meter.take().data_reconnects == 2


def test_counters_add_up_over_threads_and_ranks() -> None:
    meter = Meter()

    def count() -> None:
        for _ in range(2000):
            meter.add("data_fetched_bytes", 2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.take() == DataCounters(data_fetched_bytes=16_000)
    assert meter.take() == DataCounters()
    assert total_counters([(0.5, 1, 0, 7, 0, 0), (2.5, 2, 1, 8, 3, 0)]) == DataCounters(2.5, 3, 1, 15, 3, 0)
