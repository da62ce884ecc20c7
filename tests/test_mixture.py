"""Mixtures: shares as asked in every batch, exactly once an epoch of each source, the same for any world, phases."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.config.schema import Config
from megassm.config.source import ConfigError
from megassm.data.dataset import open_dataset
from megassm.data.index import ShardSet, ShardSizes
from megassm.data.mixture import DataSource, Mixture, MixturePhase, ReadOptions, check_repeats, one_source
from megassm.data.order import PATTERN, MixtureOrder, OrderPhase, SampleOrder, epoch_samples
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.stream import StreamPlan, TokenStream, validation_batches
from megassm.errors import UserError
from tests.conftest import run_python
from tests.shard_sets import SMALL, WideTokenizer, edit_index, random_documents, write_documents

WORLDS = (1, 2, 3, 4, 8, 48)


def orders(*samples: int, lanes: int = 48) -> list[SampleOrder]:
    return [SampleOrder(count, 5, lanes, 64) for count in samples]


def test_one_source_is_that_source() -> None:
    """The order of a run with one data set is what it was before there were mixtures."""
    [order] = orders(1009)
    for phases in ([OrderPhase(0, (1.0,))], [OrderPhase(0, (0.3,)), OrderPhase(480, (2.0,)), OrderPhase(1001, (1.0,))]):
        mixture = MixtureOrder([order], phases)
        for sample in (*range(0, 1200), 10**6, 10**6 + 1):
            assert mixture.locate(sample) == (0, *order.locate(sample))


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 120), min_size=1, max_size=4),
    weights=st.lists(st.tuples(*[st.sampled_from([0.0, 0.01, 0.3, 1.0, 2.5])] * 4), min_size=1, max_size=3),
    starts=st.tuples(st.integers(1, 300), st.integers(301, 600)),
    lanes=st.integers(1, 50),
)
def test_each_sample_of_each_source_comes_once_before_any_comes_again(
    counts: list[int], weights: list[tuple[float, ...]], starts: tuple[int, int], lanes: int
) -> None:
    """Counted in turns (source, epoch, number): none twice, and of each source the first ones are all there."""
    phases = [
        OrderPhase(first, row[: len(counts)] if any(row[: len(counts)]) else (1.0,) * len(counts))
        for first, row in zip((0, *starts), weights, strict=False)
    ]
    mixture = MixtureOrder(orders(*counts, lanes=lanes), phases)
    seen = Counter(mixture.locate(sample) for sample in range(1000))
    assert set(seen.values()) == {1}
    for source, count in enumerate(counts):
        epochs = Counter(place.epoch for place in seen if place.source == source)
        read = sum(epochs.values())
        assert mixture.epochs(1000)[source] == pytest.approx(read / count)
        seam = 2 * lanes * len(phases)  # a lane may be a row or two ahead, in each phase
        assert all(epochs[epoch] == count for epoch in range(max(0, (read - seam) // count)))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.5), (5.0, 3.0, 2.0), (0.9, 0.09, 0.009, 0.001)])
def test_shares_are_as_asked_in_every_stretch(weights: tuple[float, ...]) -> None:
    mixture = MixtureOrder(orders(*[10**6] * len(weights)), [OrderPhase(0, weights)])
    shares = np.array(weights) / sum(weights)
    sources = np.array([mixture.locate(sample).source for sample in range(4800)])
    for size in (48, 480, 4800):
        for start in range(0, 4800, size):
            got = np.bincount(sources[start : start + size], minlength=len(weights))
            assert np.abs(got - shares * size).max() <= (2.0 if size == 48 else 0.02 * size)
    for start in range(0, 4800, 8):  # small batches too
        got = np.bincount(sources[start : start + 8], minlength=len(weights))
        assert np.abs(got - shares * 8).max() <= 2.0


def test_weights_are_kept_exactly_over_a_period() -> None:
    mixture = MixtureOrder(orders(*[10**6] * 3, lanes=1), [OrderPhase(0, (0.5, 0.4999, 0.0001))])
    assert Counter(mixture.locate(sample).source for sample in range(PATTERN)) == {0: 5000, 1: 4999, 2: 1}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    folder = tmp_path_factory.mktemp("mixture")
    books = write_documents(folder / "books", random_documents(300))
    code = write_documents(folder / "code", random_documents(100, seed=1))
    phases = (MixturePhase(0, {"books": 0.7, "code": 0.3}), MixturePhase(6, {"code": 1.0, "books": 1.0}))
    return Mixture((DataSource("books", books), DataSource("code", code)), phases)


def global_batch(data: Mixture, world: int, step: int) -> dict[int, bytes]:
    rows = {}
    for rank in range(world):
        stream = TokenStream(data, StreamPlan(10, 48, 48 // world, seed=7, rank=rank, world_size=world))
        batch = stream.micro_batch(step, 0)
        for row, sample in enumerate(batch.sample_ids_B.tolist()):
            rows[sample] = batch.ids_BT[row].tobytes() + batch.mask_BL[row].tobytes()
    return rows


def test_every_world_sees_the_same_batches_at_any_step(mixture: Mixture) -> None:
    """A run that resumes 50 times at random steps, each time with another number of ranks."""
    whole = TokenStream(mixture, StreamPlan(10, 48, 48, seed=7))
    expected = {}
    for step, batch in enumerate(whole.batches(0, 60)):
        rows = zip(batch.sample_ids_B.tolist(), batch.ids_BT, batch.mask_BL, strict=True)
        expected[step] = {sample: ids.tobytes() + mask.tobytes() for sample, ids, mask in rows}
    draw = random.Random(0)
    for _ in range(50):
        step, world = draw.randrange(60), draw.choice(WORLDS)
        assert global_batch(mixture, world, step) == expected[step]


def test_each_token_of_each_source_is_predicted_once_an_epoch(tmp_path: Path) -> None:
    """Two sources of ids that are all different: what is seen can be counted."""
    sets = []
    for source, tokens in enumerate((900, 2100)):
        with ShardWriter(tmp_path / str(source), WideTokenizer(), SMALL) as writer:
            for start in range(0, tokens, 50):
                writer.add(np.arange(start, min(start + 49, tokens - 1)) + 100_000 * source, text_bytes=49)
            sets.append(writer.finish())
    phase = MixturePhase(0, {"0": 0.4, "1": 0.6})
    data = Mixture((DataSource("0", sets[0]), DataSource("1", sets[1])), (phase,))
    stream = TokenStream(data, StreamPlan(16, 12, 12, seed=3))
    samples = [epoch_samples(shards.tokens, 16) for shards in sets]
    by_epoch: dict[tuple[int, int], Counter[int]] = {}
    for batch in stream.batches(0, 40):
        for row, sample in enumerate(batch.sample_ids_B.tolist()):
            place = stream.order.locate(sample)
            labels = batch.ids_BT[row, 1:][batch.mask_BL[row]]
            by_epoch.setdefault((place.source, place.epoch), Counter()).update(labels[labels < 200_000].tolist())
    assert by_epoch.keys() >= {(0, 0), (0, 1), (1, 0), (1, 1)}
    for source, shards in enumerate(sets):
        assert stream.epochs(40)[str(source)] * samples[source] > samples[source] + 2 * 48
        seen = by_epoch[source, 0]
        assert set(seen.values()) == {1}
        ids = shards.tokens - shards.documents
        assert len(seen) in (ids - 1, ids)  # the stream's first token is never predicted


def test_a_rank_reads_its_own_lanes_of_each_source(tmp_path: Path) -> None:
    sizes = ShardSizes(10_000, 500, 500)
    sources = tuple(
        DataSource(name, write_documents(tmp_path / name, random_documents(3000, int(name)), sizes))
        for name in ("0", "1")
    )
    data = Mixture(sources, (MixturePhase(0, {"0": 2.0, "1": 1.0}),))
    stream = TokenStream(data, StreamPlan(10, 48, 1, seed=7, rank=11, world_size=48))
    steps = epoch_samples(sources[0].shards.tokens, 10) * 3 // 2 // 48  # one epoch of the first, half of the other
    assert sum(1 for _ in stream.batches(0, steps)) == steps
    blocks = sum(len(source.shards.blocks) for source in sources)
    assert stream.reader.memory.fetches <= 0.75 * blocks / 48 + 4
    lane = 2 * (2 * 64 * 10 + 2 * max(int(source.shards.blocks["tokens"].max()) for source in sources))
    assert stream.reader.memory.largest_bytes <= 2 * lane


def test_the_fingerprint_covers_all_that_decides_the_batches(mixture: Mixture) -> None:
    books, code = mixture.sources
    phases = mixture.phases
    others = [
        Mixture((books, code), phases[:1]),
        Mixture((books, code), (MixturePhase(0, {"books": 0.6, "code": 0.4}), phases[1])),
        Mixture((books, code), (phases[0], MixturePhase(7, phases[1].weights))),
        Mixture((DataSource("books", code.shards), DataSource("code", books.shards)), phases),
        one_source(books.shards),
    ]
    prints = {data.fingerprint for data in (mixture, *others)}
    assert len(prints) == 6
    assert one_source(books.shards).fingerprint == books.shards.fingerprint
    assert Mixture((books, code), phases, ReadOptions(on_bad_block="mask")).fingerprint == mixture.fingerprint


def test_validation_takes_equally_many_of_each_source(mixture: Mixture) -> None:
    plan = StreamPlan(10, 8, 8, seed=7)
    [batch] = validation_batches(mixture, plan, 7)
    alone = [next(iter(validation_batches(source.shards, plan, 8))).ids_BT for source in mixture.sources]
    assert np.array_equal(batch.ids_BT[:7], np.concatenate([alone[0][:4], alone[1][:3]]))
    assert batch.sample_ids_B.tolist() == [*range(7), -1]


@pytest.fixture(scope="module")
def two_paths(data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The data set of all tests, and a smaller one."""
    folder = tmp_path_factory.mktemp("second")
    text = folder / "poem.txt"
    text.write_text("\n".join(f"Line {number} of a poem that does not rhyme." for number in range(900)))
    lines = folder / "poem.jsonl"
    poems = text.read_text().split("\n")
    lines.write_text("\n".join(json.dumps({"text": "\n".join(poems[at : at + 9])}) for at in range(0, 900, 9)))
    run_python("tools/prepare_data.py", "--input", str(lines), "--output", str(folder / "set"),
               "--valid-fraction", "0.2", "--block-tokens", "4096", "--member-tokens", "4096")  # fmt: skip
    return data_path, folder / "set"


def mixed(two_paths: tuple[Path, Path], phases: str, *more: str) -> tuple[str, ...]:
    sources = f"data.sources={{poems: '{two_paths[1]}', code: '{two_paths[0]}'}}"
    return ("data.path=null", sources, f"data.phases={phases}", *more)


def test_a_mixture_from_a_configuration(two_paths: tuple[Path, Path], small_config: Callable[..., Config]) -> None:
    phases = "[{start_step: 0, sources: {code: 3, poems: 1}}, {start_step: 4, sources: {poems: 1}}]"
    data = open_dataset(small_config(*mixed(two_paths, phases)))
    assert [source.name for source in data.train.sources] == ["code", "poems"]
    stream = TokenStream(data.train, StreamPlan(64, 4, 4, seed=0))
    texts = [data.tokenizer.decode(row) for batch in stream.batches(0, 8) for row in batch.ids_BT.tolist()]
    assert [("poem" in text or "rhyme" in text or "Line" in text) for text in texts].count(True) >= 4 + 16
    assert all("poem" in text or "rhyme" in text or "Line" in text for text in texts[16:])
    assert stream.epochs(8)["code"] > 0


def test_too_many_epochs_are_refused_with_the_numbers(
    two_paths: tuple[Path, Path], data_path: Path, small_config: Callable[..., Config]
) -> None:
    phases = "[{start_step: 0, sources: {code: 0.5, poems: 0.5}}]"
    refused = "data.on_repeats=refuse"

    def check(*overrides: str) -> None:
        config = small_config(*overrides)
        check_repeats(open_dataset(config).train, config)

    with pytest.raises(
        UserError, match=r"data\.max_epochs = 4: 20000 steps would read 'code' [\d.]+ times \([\d,]+ of "
    ):
        check(*mixed(two_paths, phases, "train.steps=20000", refused))
    with pytest.raises(UserError, match=r"data\.max_epochs = 0\.5: 600 steps would read .*'poems' [\d.]+ times"):
        check(*mixed(two_paths, phases, "train.steps=600", "data.max_epochs=0.5", refused))
    check(*mixed(two_paths, phases, "train.steps=20000", "data.max_epochs=1000", refused))
    with pytest.raises(UserError, match=r"read the training text [\d.]+ times .*lower train\.steps to [\d,]+"):
        check("train.steps=20000", refused)
    check("train.steps=20000", "data.on_repeats=warn")
    try:
        check("train.steps=20000", refused)
    except UserError as error:
        fitting = str(error).partition("train.steps to ")[2].split(", give")[0].replace(",", "")
        check(f"train.steps={fitting}", refused)  # the way out is one


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data.path=null",), "data.path = null: must be given"),
        (("data.sources={a: x}",), "must be null where data.sources has the data sets"),
        (("data.path=null", "data.sources={a: x}"), "data.phases = []: must be given with data.sources"),
        (("data.phases=[{start_step: 0, sources: {a: 1}}]",), "must be given with data.sources, and only then"),
        ("[{start_step: 1, sources: {a: 1, b: 1}}]", "must be in order, the first with start_step: 0"),
        ("[{start_step: 0, sources: {a: 1}}, {start_step: 0, sources: {b: 1}}]", "must be in order"),
        ("[{start_step: 0, sources: {a: 1, c: 1}}]", "must be weights of a, b, at least one a phase"),
        ("[{start_step: 0, sources: {a: 1, b: 1}}, {start_step: 5, sources: {}}]", "at least one a phase"),
        ("[{start_step: 0, sources: {a: 1}}]", "must be in a phase each; b is in none"),
        ("[{start_step: 0, sources: {a: 1, b: 0}}]", "data.phases.0.sources.b = 0: must be greater than 0"),
        ("[{start_step: 0, sources: {a: many, b: 1}}]", "data.phases.0.sources.a = 'many': must be a number"),
        ("[{start: 0, sources: {a: 1, b: 1}}]", "no key 'data.phases.0.start'"),
    ],
)
def test_broken_rules(small_config: Callable[..., Config], overrides: str | tuple[str, ...], expected: str) -> None:
    if isinstance(overrides, str):
        overrides = ("data.path=null", "data.sources={a: x, b: y}", f"data.phases={overrides}")
    with pytest.raises(ConfigError) as told:
        small_config(*overrides)
    assert any(expected in mistake for mistake in told.value.mistakes), told.value.mistakes


def test_sources_of_two_tokenizers_are_refused(
    two_paths: tuple[Path, Path], tmp_path: Path, small_config: Callable[..., Config]
) -> None:
    other = Path(shutil.copytree(two_paths[1], tmp_path / "other"))
    for split in ("train", "valid"):
        edit_index(other / split, lambda index: index.update(tokenizer_sha256="0" * 64))
    phases = "[{start_step: 0, sources: {code: 1, poems: 1}}]"
    with pytest.raises(UserError, match=r"other/train: its shards were made with tokenizer bytes \(sha256 0000"):
        open_dataset(small_config(*mixed((two_paths[0], other), phases)))


def damaged_copy(shards: ShardSet, folder: Path) -> tuple[ShardSet, int]:
    """A copy with a flipped bit in the middle block of the first shard, and that block's tokens."""
    from megassm.data.index import load_index

    copy = Path(shutil.copytree(shards.directory, folder / "damaged"))
    entry = shards.blocks[1]
    raw = bytearray((copy / "shard-00000.tar").read_bytes())
    raw[int(entry["offset"]) + 600] ^= 1
    (copy / "shard-00000.tar").write_bytes(raw)
    return load_index(copy), int(entry["tokens"])


def test_damaged_blocks_are_masked_where_that_is_asked_for(
    mixture: Mixture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books = mixture.sources[0].shards
    damaged, tokens = damaged_copy(books, tmp_path)
    plan = StreamPlan(10, 48, 48, seed=7)
    steps = epoch_samples(books.tokens, 10) // 48
    stream = TokenStream(one_source(damaged, ReadOptions(on_bad_block="mask")), plan)
    masked = 0
    for got, sound in zip(stream.batches(0, steps), TokenStream(books, plan).batches(0, steps), strict=True):
        assert np.array_equal(got.sample_ids_B, sound.sample_ids_B), "a slot is never dropped"
        whole = got.mask_BL.any(axis=1)
        assert np.array_equal(got.ids_BT[whole], sound.ids_BT[whole])
        masked += int((~whole).sum())
    assert tokens // 10 - 1 <= masked <= tokens // 10 + 2
    assert stream.meter.take().data_masked_samples == masked
    assert capsys.readouterr().err.count("warning: its samples train nothing: ") == 1
    with pytest.raises(UserError, match=r"damaged/shard-00000\.tar, block at offset \d+: damaged: expected CRC32"):
        list(TokenStream(damaged, plan).batches(0, steps))
