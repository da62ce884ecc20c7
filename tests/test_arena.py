"""Long Range Arena's tasks, small: the sets are what the experiments say, and authors are known by unseen books."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from megassm.config.presets import PRESETS
from megassm.cost import parameters
from megassm.data.task import load_task
from megassm.errors import UserError
from tests.conftest import ROOT
from tests.small_sets import small_task, write_books
from tools.experiments.arena import ARENA
from tools.experiments.definitions import EXPERIMENTS
from tools.experiments.passages import EDGE, WIDTH, passages, read_books, room, split_up


def test_the_sets_are_those_of_the_experiments(tmp_path: Path) -> None:
    readme = (ROOT / "tools/experiments/README.md").read_text(encoding="utf-8")
    for name, wanted in ARENA.items():
        config = EXPERIMENTS[name].configuration()
        assert f"make_task.py {wanted.arguments} --output {config.data.path}" in readme
        task = load_task(small_task(name, "", tmp_path) / "task.json").task
        assert task.length == config.model.seq_len
        assert task.first_symbol + len(task.symbols) == config.model.vocab_size
        assert len(task.answers) == config.model.classes
        for line in (tmp_path / "passages" / "valid.jsonl").read_text().splitlines() if "authors" in name else ():
            row = json.loads(line)
            assert set(re.findall(r"a(\d)b(\d)", row["text"])) == {(row["label"][-1], "0")}, "the shorter book only"


def test_models_of_the_arena_have_equal_parameters() -> None:
    for name in ARENA:
        base = EXPERIMENTS[name].configuration()
        wanted = parameters(base.model, base.model.num_channels)
        arms = EXPERIMENTS[name].arms(base)
        for arm in arms:
            config = EXPERIMENTS[name].configuration(arm.overrides)
            assert parameters(config.model, config.model.num_channels) == pytest.approx(wanted, rel=0.01), arm.name
            if "preset" in arm.name:
                layer = PRESETS["paper"]["model"]
                assert {key: getattr(config.model, key) for key in layer} == layer | {"sigma_scale": ("quarter_power",)}
                assert config.budget.sampler == "authors"
        assert len(arms) == 4


def test_passages_are_apart_and_drawn_by_the_seed(tmp_path: Path) -> None:
    write_books(tmp_path / "books.jsonl", authors=3)
    books = read_books(tmp_path / "books.jsonl")
    splits = split_up(books, authors=2, held=3)
    longest = sorted(books, key=lambda author: -sum(map(len, books[author].values())))[:2]
    assert list(splits["train"]) == list(splits["valid"]) == longest
    assert {title for titles in splits["valid"].values() for title in titles} == {"Book 0.md"}
    found = list(passages(splits["train"], 20, "0 train"))
    assert found == list(passages(splits["train"], 20, "0 train"))
    assert found != list(passages(splits["train"], 20, "1 train"))
    for author in longest:
        text = books[author]["Book 1.md"]
        places = sorted(text.index(passage) for of, passage in found if of == author)
        assert len(places) == 20
        assert all(later - earlier >= WIDTH for earlier, later in pairwise(places))
        assert places[0] >= EDGE
        assert places[-1] + WIDTH <= len(text) - EDGE


def test_what_has_no_two_books_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "books.jsonl"
    write_books(path, authors=2)
    with pytest.raises(UserError, match="--authors 3: 2 have two books"):
        split_up(read_books(path), authors=3, held=3)
    with pytest.raises(UserError, match=f"0 have two books of {room(100):,} characters"):
        split_up(read_books(path), authors=1, held=100)
    for line in ('{"id": "no slash", "text": "x"}', "[1]", "{", '{"text": "x"}', '{"id": 3, "text": "x"}'):
        path.write_text(line)
        with pytest.raises(UserError, match=r"books.jsonl:1: a line is"):
            read_books(path)
