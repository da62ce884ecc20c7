"""The stream: equal global batches for any number of ranks, exactly once an epoch, bounded, never silent."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.blocks import FETCHES, local_fetch
from megassm.data.index import ShardSet, ShardSizes
from megassm.data.order import epoch_samples
from megassm.data.stream import MicroBatch, StreamPlan, TokenStream, validation_batches
from megassm.errors import UserError
from tests.shard_sets import random_documents, write_documents, write_unique_ids

WORLDS = (1, 2, 3, 4, 8, 48)
BATCH = 48


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_documents(tmp_path_factory.mktemp("set"), random_documents(400))


def plan(world_size: int = 1, rank: int = 0, micro: int = 1, batch: int = BATCH, seq_len: int = 10) -> StreamPlan:
    return StreamPlan(seq_len, batch, micro, seed=7, rank=rank, world_size=world_size)


def samples_of(shards: ShardSet, seq_len: int = 10) -> int:
    return epoch_samples(shards.tokens, seq_len)


def global_micro_batch(streams: list[TokenStream], step: int, micro_step: int) -> dict[int, bytes]:
    """Sample number -> its ids and mask, over all ranks."""
    rows = {}
    for stream in streams:
        batch = stream.micro_batch(step, micro_step)
        for row, sample in enumerate(batch.sample_ids_B.tolist()):
            assert sample not in rows
            rows[sample] = batch.ids_BT[row].tobytes() + batch.mask_BL[row].tobytes()
    return rows


def test_every_world_sees_the_same_global_micro_batches(shards: ShardSet) -> None:
    reference = TokenStream(shards, plan(micro=BATCH))
    assert samples_of(shards) == -(-(shards.tokens - 1) // 10)
    last_step = samples_of(shards) // BATCH + 1
    for world in WORLDS:
        streams = [TokenStream(shards, plan(world, rank)) for rank in range(world)]
        for step in (0, 1, 5, last_step):
            micro_batches = [global_micro_batch(streams, step, m) for m in range(streams[0].micro_steps)]
            together = {sample: row for rows in micro_batches for sample, row in rows.items()}
            assert together == global_micro_batch([reference], step, 0)
            for m, rows in enumerate(micro_batches):
                assert sorted(rows) == list(range(step * BATCH + m * world, step * BATCH + (m + 1) * world))


def test_micro_8_on_one_rank_is_micro_4_on_two(shards: ShardSet) -> None:
    one = TokenStream(shards, plan(micro=8))
    two = [TokenStream(shards, plan(2, rank, micro=4)) for rank in range(2)]
    assert one.micro_steps == two[0].micro_steps == 6
    for micro_step in range(6):
        assert global_micro_batch([one], 3, micro_step) == global_micro_batch(two, 3, micro_step)


@settings(deadline=None, max_examples=20)
@given(start=st.integers(0, 200), world=st.sampled_from(WORLDS), rank=st.integers(0, 47))
def test_a_resumed_run_goes_on_with_the_same_batches(shards: ShardSet, start: int, world: int, rank: int) -> None:
    """A new stream that begins at any step gives what one that read on from there gives."""
    before, after = TokenStream(shards, plan(world, rank % world)), TokenStream(shards, plan(world, rank % world))
    for _ in before.batches(max(0, start - 2), start):
        pass
    for left, right in zip(before.batches(start, start + 2), after.batches(start, start + 2), strict=True):
        assert np.array_equal(left.sample_ids_B, right.sample_ids_B)
        assert np.array_equal(left.ids_BT, right.ids_BT)


def test_a_run_that_resumes_often_at_other_world_sizes_sees_the_same_global_batches(shards: ShardSet) -> None:
    whole = TokenStream(shards, plan(micro=BATCH))
    draw = random.Random(1)
    for _ in range(50):
        step, world = draw.randrange(4 * samples_of(shards) // BATCH), draw.choice(WORLDS)
        streams = [TokenStream(shards, plan(world, rank, micro=BATCH // world)) for rank in range(world)]
        assert global_micro_batch(streams, step, 0) == global_micro_batch([whole], step, 0)


@pytest.mark.parametrize("tokens", [2, 37, 500, 5000])  # far fewer samples than lanes x window
@pytest.mark.parametrize("seq_len", [1, 16])
def test_every_token_is_predicted_once_an_epoch(tmp_path: Path, tokens: int, seq_len: int) -> None:
    shards = write_unique_ids(tmp_path, tokens)
    stream = TokenStream(shards, plan(micro=4, batch=4, seq_len=seq_len))
    n = samples_of(shards, seq_len)
    predicted: list[Counter[int]] = [Counter(), Counter()]
    first_token = [{shards.eod}, {shards.eod}]
    for batch in stream.batches(0, -(-2 * n // 4)):
        labels = batch.ids_BT[:, 1:]
        for row, sample in enumerate(batch.sample_ids_B.tolist()):
            if sample < 2 * n:
                predicted[sample // n].update(labels[row][batch.mask_BL[row]].tolist())
                first_token[sample // n].add(int(batch.ids_BT[row, 0]))
    for epoch in range(2):
        assert predicted[epoch].total() == shards.tokens - 1
        counts = {i: count for i, count in predicted[epoch].items() if i != shards.eod}
        assert set(counts.values()) <= {1}
        unpredicted = {i for i in range(tokens - 1) if i % 50 != 49} - set(counts)
        assert len(unpredicted) == 1  # the stream's first token
        assert unpredicted <= first_token[epoch]


def test_inputs_are_the_stored_tokens_in_order(shards: ShardSet) -> None:
    """Without lanes, window and several blocks' order a sample is a slice of the documents."""
    stored = np.concatenate([np.append(ids, 256) for ids in random_documents(400)])
    [batch] = validation_batches(shards, plan(micro=6), 6)
    assert batch.ids_BT.tolist() == [stored[row * 10 : row * 10 + 11].tolist() for row in range(6)]
    assert batch.mask_BL.all()
    assert (batch.ids_BT.dtype, batch.mask_BL.dtype, batch.sample_ids_B.dtype) == (np.int64, np.bool_, np.int64)


def test_the_last_sample_is_short_and_masked(tmp_path: Path) -> None:
    shards = write_unique_ids(tmp_path, 24)
    batches = list(validation_batches(shards, plan(seq_len=10), 99))
    assert [int(batch.mask_BL.sum()) for batch in batches] == [10, 10, 3]
    assert batches[-1].ids_BT[0, 4:].tolist() == [shards.eod] * 7


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("asked", [1, 7, 50, 10**6])
def test_validation_gives_each_sequence_once(shards: ShardSet, world: int, asked: int) -> None:
    ranks = [list(validation_batches(shards, plan(world, rank), asked)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    samples = [s for batches in ranks for batch in batches for s in batch.sample_ids_B.tolist()]
    held = samples_of(shards)
    assert sorted(s for s in samples if s >= 0) == list(range(min(asked, held)))
    for batches in ranks:
        for batch in batches:
            assert not batch.mask_BL[batch.sample_ids_B < 0].any()
    with pytest.raises(UserError, match="0 sequences"):
        validation_batches(shards, plan(), 0)


def test_memory_stays_within_its_bound(tmp_path: Path) -> None:
    """Many blocks, a cache that holds few: the bound holds, the batches are the same."""
    shards = write_documents(tmp_path, random_documents(3000), ShardSizes(10_000, 500, 500))
    assert len(shards.blocks) > 200
    roomy, tight = TokenStream(shards, plan(micro=4)), TokenStream(shards, plan(micro=4), memory_bytes=8000)
    for left, right in zip(roomy.batches(0, 10), tight.batches(0, 10), strict=True):
        assert np.array_equal(left.ids_BT, right.ids_BT)
        assert tight.reader.memory.largest_bytes <= 8000


def test_a_rank_reads_its_own_lanes_only(tmp_path: Path) -> None:
    """With 48 lanes on 48 ranks, a rank reads about a 48th of the blocks, each once."""
    shards = write_documents(tmp_path, random_documents(3000), ShardSizes(10_000, 500, 500))
    stream = TokenStream(shards, plan(48, rank=11))
    steps = samples_of(shards) // BATCH
    assert sum(1 for _ in stream.batches(0, steps)) == steps
    assert stream.reader.memory.fetches <= len(shards.blocks) / 48 + 2


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "data-prefetch"]


def test_closing_or_dropping_the_iterator_ends_its_thread(shards: ShardSet) -> None:
    stream = TokenStream(shards, plan())
    closed, dropped = stream.batches(0, 10**6), stream.batches(0, 10**6)
    next(closed), next(dropped)
    assert len(data_threads()) == 2
    closed.close()  # type: ignore[attr-defined]
    assert len(data_threads()) == 1
    del dropped
    gc.collect()
    assert data_threads() == []


def test_the_thread_stays_a_bounded_number_of_batches_ahead(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TokenStream(shards, plan())
    made: list[object] = []
    original = stream.reader.read
    monkeypatch.setattr(stream.reader, "read", lambda pieces, into: (made.append(pieces), original(pieces, into))[1])
    batches = stream.batches(0, 10**6)
    next(batches)
    time.sleep(0.3)
    assert len(made) <= 6
    batches.close()  # type: ignore[attr-defined]


def test_damage_is_raised_in_the_consumer_after_the_batches_before_it(tmp_path: Path) -> None:
    shards = write_documents(tmp_path, random_documents(400))
    read = local_fetch(shards.directory)
    fetched = 0

    def damaged_after_ten(shard: str, offset: int, size: int) -> bytes:
        nonlocal fetched
        fetched += 1
        return read(shard, offset, size) if fetched <= 10 else bytes(size)

    stream = TokenStream(shards, plan(), fetch=damaged_after_ten, memory_bytes=1)
    got: list[MicroBatch] = []
    with pytest.raises(UserError, match=r"shard-\d+\.tar, block at offset \d+: .*CRC32"):
        got.extend(stream.batches(0, 10))
    assert fetched == 10 + FETCHES
    assert len(got) > 5
    for batch, sound in zip(got, TokenStream(shards, plan()).batches(0, 10), strict=False):
        assert np.array_equal(batch.ids_BT, sound.ids_BT)
    gc.collect()
    assert data_threads() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"world": 5}, r"48 sequences is not a multiple of 1 \(micro-batch\) x 5 \(ranks\) = 5"),
        ({"rank": 2}, r"rank 2 is not in \[0, world_size = 2\)"),
        ({"seq_len": 0}, "seq_len is 0"),
    ],
)
def test_plan_refusals(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(arguments.get("world", 2), arguments.get("rank", 0), seq_len=arguments.get("seq_len", 10))


def test_a_data_set_of_one_token_is_refused(tmp_path: Path) -> None:
    shards = write_documents(tmp_path, [np.empty(0, dtype=np.int64)])
    with pytest.raises(UserError, match="nothing to predict"):
        TokenStream(shards, plan())
