"""The stream through a real nginx whose workers are killed and whose connections time out: the same batches."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megassm.data.index import ShardSet, ShardSizes, load_index
from megassm.data.mixture import Mixture, ReadOptions, one_source
from megassm.data.stores import open_store
from megassm.data.stream import StreamPlan, TokenStream
from megassm.data.transport import Patience
from tests.services import kill_a_worker, nginx
from tests.shard_sets import random_documents, write_documents

PLAN = StreamPlan(seq_len=200, batch_sequences=48, micro_batch_sequences=48, seed=3)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("nginx") / "set"
    return write_documents(folder, random_documents(800, longest=4000), ShardSizes(400_000, 50_000, 25_000))


def remote_mixture(url: str) -> Mixture:
    reading = ReadOptions(Patience(deadline_s=60.0, first_wait_s=0.02, longest_wait_s=0.2), batch_wait_s=60.0)
    return one_source(load_index(open_store(f"{url}/set")), reading)


def test_killed_workers(local: ShardSet, tmp_path: Path) -> None:
    with nginx(local.directory.parent, tmp_path, options="limit_rate 150k;") as server:
        stream = TokenStream(remote_mixture(server.url), PLAN)
        ended = threading.Event()

        def kill() -> None:
            while not ended.wait(0.15):
                kill_a_worker(server)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            for got, expected in zip(stream.batches(0, 60), TokenStream(local, PLAN).batches(0, 60), strict=True):
                assert np.array_equal(got.ids_BT, expected.ids_BT)
        finally:
            ended.set()
            killer.join()
    counted = stream.meter.take()
    assert counted.data_reconnects >= 5
    assert counted.data_refetches == 0
    assert counted.data_fetched_bytes == local.blocks["size"].sum(), "each byte was fetched once"


def test_a_consumer_that_pauses_longer_than_the_server_waits(local: ShardSet, tmp_path: Path) -> None:
    with nginx(local.directory.parent, tmp_path) as server:
        mixture = remote_mixture(server.url)
        tight = TokenStream(mixture, PLAN, memory_bytes=400_000)  # so that it fetches all along
        sound = TokenStream(local, PLAN).batches(0, 12)
        for number, (got, expected) in enumerate(zip(tight.batches(0, 12), sound, strict=True)):
            assert np.array_equal(got.ids_BT, expected.ids_BT)
            if number in (4, 8):
                time.sleep(2.5)
    assert tight.reader.memory.fetches > len(local.blocks)
