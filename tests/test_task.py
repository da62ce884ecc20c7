"""Labelled examples as a data set: they coincide with samples, only answers count, and models must fit them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megassm.config.schema import Config
from megassm.data.dataset import Dataset, open_dataset
from megassm.data.index import ShardSizes
from megassm.data.stream import MicroBatch, StreamPlan, TokenStream, validation_batches
from megassm.data.task import Example, Task, TaskTokenizer, load_task
from megassm.data.tasks import write
from megassm.data.tasks.synthetic import Recall, drawn
from megassm.data.tasks.write import write_task
from megassm.data.tokenizer.base import load_tokenizer
from megassm.errors import UserError

RECALL = Recall(pairs=5, queries=3, keys=9, values=4)
TASK = RECALL.task(24)
COUNTS = {"train": 131, "valid": 7}
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def recall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of many small blocks."""
    folder = tmp_path_factory.mktemp("tasks") / "recall"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "SIZES", ShardSizes(shard_tokens=1000, block_tokens=200, member_tokens=100))
        write_task(folder, TASK, {split: examples(split) for split in COUNTS})
    return folder


@pytest.fixture
def data(small_config: Make, recall: Path) -> Dataset:
    return open_dataset(small_config(f"data.path={recall}", "model.seq_len=24"))


def examples(split: str) -> list[Example]:
    return list(drawn(RECALL.draw(TASK), COUNTS[split], seed=3, split=split == "valid"))


def plan(**changes: int) -> StreamPlan:
    return StreamPlan(**({"seq_len": 24, "batch_sequences": 4, "micro_batch_sequences": 2, "seed": 5} | changes))


def check_rows(batch: MicroBatch) -> list[tuple[int, ...]]:
    """Every row is one whole example, and what counts is what it asks; returns the examples."""
    for ids_T, mask_L in zip(batch.ids_BT, batch.mask_BL, strict=True):
        separator = ids_T.tolist().index(TASK.separator)
        asked = list(range(separator + 2, separator + 2 + 2 * TASK.asked, 2))
        assert separator == 2 * RECALL.pairs
        assert (ids_T[asked] < len(TASK.answers)).all()
        assert (np.flatnonzero(mask_L) + 1).tolist() == asked, "position p predicts id p + 1"
    return [tuple(ids_T[:-1].tolist()) for ids_T in batch.ids_BT]


def test_an_epoch_has_every_example_once_and_only_answers_count(data: Dataset) -> None:
    assert len(data.train.sources[0].shards.blocks) > 10
    stream = TokenStream(data.train, plan(batch_sequences=131, micro_batch_sequences=131))
    for epoch in range(2):
        seen = check_rows(stream.micro_batch(epoch, 0))
        assert sorted(seen) == sorted((*TASK.ids(example).tolist(), 6) for example in examples("train"))


def test_a_resumed_stream_on_other_ranks_is_the_same(data: Dataset) -> None:
    whole = list(TokenStream(data.train, plan()).batches(0, 12))
    for rank in range(2):
        resumed = list(TokenStream(data.train, plan(micro_batch_sequences=2, rank=rank, world_size=2)).batches(7, 12))
        for step, batch in enumerate(resumed, 7):
            rows = np.concatenate([part.ids_BT for part in whole[2 * step : 2 * step + 2]])[rank::2]
            masks = np.concatenate([part.mask_BL for part in whole[2 * step : 2 * step + 2]])[rank::2]
            assert (batch.ids_BT == rows).all()
            assert (batch.mask_BL == masks).all()


def test_validation_has_the_examples_in_order(data: Dataset) -> None:
    batches = list(validation_batches(data.valid, plan(), 100))
    rows = np.concatenate([batch.ids_BT for batch in batches])[:7, :-1]
    assert rows.tolist() == [[*TASK.ids(example).tolist(), 6] for example in examples("valid")]
    assert sum(int(batch.mask_BL.sum()) for batch in batches) == 7 * TASK.asked


def test_the_description_is_kept_and_bits_are_of_answers(recall: Path) -> None:
    tokenizer = load_tokenizer(recall / "task.json")
    assert isinstance(tokenizer, TaskTokenizer)
    assert tokenizer.task == TASK
    assert tokenizer.vocab_size == 4 + 3 + 9
    assert tokenizer.token_bytes().tolist() == [1] * 4 + [0] * 12
    assert tokenizer.decode([TASK.first_symbol + 8, 2, TASK.separator, TASK.pad, tokenizer.eod]) == "k8 v2 =>"
    with pytest.raises(UserError, match="'recall' are no text"):
        tokenizer.encode(["x"])
    with pytest.raises(UserError, match="is there already"):
        write_task(recall, TASK, {})


def test_damaged_descriptions_and_examples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"name": "x"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"task\.json: length: Field required; .*no task's description"):
        load_task(tmp_path / "task.json")
    task = Task("t", 6, ("a", "b"), ("s",))
    assert task.ids(Example(np.array([5, 5]), np.array([1]))).tolist() == [5, 5, 2, 1, 3]
    with pytest.raises(UserError, match="needs sequences of 7; --length is 6"):
        task.ids(Example(np.array([5] * 4), np.array([1])))
    with pytest.raises(UserError, match="asks 2 answers, not 1"):
        task.ids(Example(np.array([5]), np.array([1, 0])))
    with pytest.raises(UserError, match="no document to write"):
        write_task(tmp_path / "none", task, {"train": [], "valid": []})
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.seq_len=32",), r"model.seq_len = 32: must be 24, the length of an example of task 'recall'"),
        (("model.seq_len=24", "model.classes=4"), r"model.classes = 4: task 'recall' has 4 answers, 3 asked for"),
        (("model.seq_len=24", "model.vocab_size=15"), r"model.vocab_size = 15: must be at least the 16 ids"),
    ],
)
def test_a_model_must_fit_the_task(small_config: Make, recall: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(small_config(f"data.path={recall}", *overrides))


def test_text_has_no_classes(small_config: Make) -> None:
    with pytest.raises(UserError, match=r"model\.classes = 2: must be null, for the data set is text"):
        open_dataset(small_config("model.classes=2"))
