"""Trained models opened from a server: bytes fetched, bits computed, growing while in use, servers that lie."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megassm.checkpoint.exported import PREFIX, SUMS, WEIGHTS, write_model_folder
from megassm.checkpoint.format import AVERAGES, read_checkpoint
from megassm.checkpoint.format import WEIGHTS as WEIGHTS_PART
from megassm.checkpoint.open import open_model, open_tokenizer
from megassm.checkpoint.ranges import REQUESTS, Part, joined
from megassm.checkpoint.tensor_file import write_tensors
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.errors import UserError
from megassm.eval.generate import sample_text
from megassm.eval.sampling import Sampling
from megassm.eval.scheduler import Request, Scheduler
from megassm.eval.session import open_for_text
from megassm.model import LanguageModel, build_model, truncate
from tests.fault_server import FaultServer, serving
from tests.test_model import config

IDS = torch.arange(3, 43)[None]
SIZES: dict[str, object] = {
    "vocab_size": 257,
    "d_model": 128,
    "n_layers": 2,
    "num_channels": 16,
    "d_ffn": 256,
    "n_heads": 4,
    "seq_len": 256,
}
SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "heads": {"pattern": "SA", "mixer_heads": 4, "gate": "sigmoid", "input_taps": 3},
    "elastic": {"pattern": "SA", "ffn_elastic": {"knee_k": 4, "below": 16, "above": 8}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of three kinds of models, whole and cut: NAME/K."""
    root = tmp_path_factory.mktemp("exports")
    for name, knobs in SHAPES.items():
        model = build_model(config(**SIZES | knobs), 1)
        for k in (2, 4, 16):
            (root / name / str(k)).mkdir(parents=True)
            write_model_folder(root / name / str(k), truncate(model, k), BytesTokenizer(), torch.float32)
    return root


@pytest.fixture
def server(folders: Path) -> Iterator[FaultServer]:
    with serving(folders) as found:
        found.faulty = WEIGHTS
        yield found


def same_bits(model: LanguageModel, other: LanguageModel, k: int | None = None) -> bool:
    with torch.no_grad():
        whole = torch.equal(model(IDS, k), other(IDS, k))
        (mine, state), (theirs, other_state) = (each.prefill(IDS, k) for each in (model, other))
        steps = (each.step(IDS[:, 0], at, k)[0] for each, at in ((model, state), (other, other_state)))
        return whole and torch.equal(mine, theirs) and torch.equal(*steps)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_budget_costs_its_own_bytes_and_gives_the_bits_of_its_export(
    server: FaultServer, folders: Path, kind: str
) -> None:
    model = open_model(f"{server.url}/{kind}/16", k=2)
    for k in (2, 4, 16):
        assert model.grow(k) is model
        export = open_model(folders / kind / str(k))
        assert model.config == export.config
        assert same_bits(model, export)
        weighs = (folders / kind / str(k) / WEIGHTS).stat().st_size
        if kind != "elastic":  # whose columns are fetched anew
            assert sum(server.sent) <= 1.05 * weighs
    fetched = sum(server.sent)
    assert model.grow(4) is model
    assert sum(server.sent) == fetched
    with pytest.raises(UserError, match="K = 17: must be between 1 and"):
        model.grow(17)


def test_columns_are_fetched_alone(server: FaultServer, folders: Path) -> None:
    open_model(f"{server.url}/elastic/16", k=2)
    assert sum(server.sent) <= 1.05 * (folders / "elastic/2" / WEIGHTS).stat().st_size
    assert len(server.sent) < 2 * REQUESTS


def test_a_model_answers_while_it_grows(server: FaultServer, folders: Path) -> None:
    model = open_model(f"{server.url}/heads/16", k=2)
    before, begun = model(IDS), model.prefill(IDS)
    scheduler = Scheduler(model)
    number = scheduler.submit(Request(IDS[0].tolist(), Sampling(30, temperature=0)))
    drawn = [scheduler.step() for _ in range(5)]
    server.faults.extend(["slow"] * 60)
    growing = threading.Thread(target=model.grow, args=(16,))
    growing.start()
    answers = 0
    while growing.is_alive():
        torch.testing.assert_close(model(IDS, 2), before, atol=1e-5, rtol=1e-5)
        answers += 1
    growing.join()
    assert answers > 3
    assert same_bits(model, open_model(folders / "heads/16"))
    small, token = open_model(folders / "heads/2"), torch.tensor([7])
    expected, _ = small.step(token, small.prefill(IDS)[1])
    assert torch.equal(model.step(token, begun[1])[0], expected)  # a text that was begun before goes on as it was
    with pytest.raises(UserError, match="begun when the model had K_max = 2; read it again"):
        model.step(token, begun[1], 16)
    later = scheduler.submit(Request(IDS[0].tolist(), Sampling(5, temperature=0)))
    drawn += [scheduler.step() for _ in range(40)]
    texts = {news.number: news.text for step in drawn for news in step if news.text is not None}
    for text, source in ((number, small), (later, model)):
        alone = Scheduler(source)
        alone.submit(Request(IDS[0].tolist(), Sampling(len(texts[text] or ()), temperature=0)))
        told = [news.token for _ in range(31) for news in alone.step()]
        assert texts[text] == told


def test_a_command_opens_the_largest_budget_it_needs(server: FaultServer, folders: Path) -> None:
    model, tokenizer, title = open_for_text(f"{server.url}/plain/16", None, "cpu", k=4)
    assert model.config.num_channels == 4
    assert title == f"{server.url}/plain/16"
    whole, *_ = open_for_text(folders / "plain/16", None, "cpu")
    greedy = Sampling(3, temperature=0)
    assert sample_text(model, tokenizer, "ab", 4, greedy) == sample_text(whole, tokenizer, "ab", 4, greedy)


def test_faults_on_the_way_change_nothing(server: FaultServer, folders: Path) -> None:
    server.faults.extend(["503", "fin", "rst", "cut", "fin"])
    assert same_bits(open_model(f"{server.url}/plain/16", k=2), open_model(folders / "plain/2"))


def test_a_file_that_is_replaced_is_refused(folders: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, "config.json", SUMS):
        (tmp_path / name).write_bytes((folders / "plain/16" / name).read_bytes())
    with serving(tmp_path) as server:
        model = open_model(server.url, k=2)
        before = model(IDS)
        save_file({name: value + 1 for name, value in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
        with pytest.raises(UserError, match="was replaced"):
            model.grow(4)
        assert torch.equal(model(IDS), before)
        assert model.config.num_channels == 2


def test_local_models_grow_too_and_models_can_be_copied(server: FaultServer, folders: Path) -> None:
    model = open_model(folders / "elastic/16", k=2)
    assert same_bits(model.grow(4), open_model(folders / "elastic/4"))
    remote = open_model(f"{server.url}/plain/16", k=2)
    for other in (copy.deepcopy(remote), pickle.loads(pickle.dumps(remote))):
        assert same_bits(other.grow(4), open_model(folders / "plain/4"))
    assert remote.config.num_channels == 2
    half = open_model(folders / "heads/16", k=2).bfloat16().requires_grad_(False).grow(4)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in half.parameters())
    whole = open_model(folders / "heads/16")
    assert whole.grow(16) is whole
    with pytest.raises(UserError, match="K = 17: must be between 1 and this model's K_max = 16"):
        whole.grow(17)


def test_runs_and_checkpoints_are_opened_from_a_server(trained: Path) -> None:
    with serving(trained) as server:
        found = open_model(server.url, k=2)
        assert same_bits(found, open_model(trained, k=2))
        newest = sorted((trained / "checkpoints").glob("step-*"))[-1]
        assert same_bits(open_model(f"{server.url}/checkpoints/{newest.name}/"), open_model(newest))
        assert open_tokenizer(server.url).sha256 == open_tokenizer(trained).sha256
        assert open_tokenizer(f"{server.url}/checkpoints/{newest.name}").sha256 == open_tokenizer(trained).sha256
        assert same_bits(found.grow(4), open_model(trained, k=4))
        assert not any("moments" in path for path, _ in server.requests)


def test_the_running_average_is_opened_in_place_of_the_weights(trained: Path, tmp_path: Path) -> None:
    folder = sorted((trained / "checkpoints").glob("step-*"))[-1]
    checkpoint, name = read_checkpoint(folder), f"{AVERAGES}-00001-of-00001.safetensors"
    for path in folder.glob(f"{WEIGHTS_PART}*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    averages = {f"{key}.ema": 0.5 * value for key, value in checkpoint.weights()}
    files = {each: facts for each, facts in checkpoint.manifest.files.items() if each.startswith(WEIGHTS_PART)}
    manifest = replace(checkpoint.manifest, files=files | {name: write_tensors(tmp_path / name, averages, int)})
    manifest = replace(manifest, checksum=manifest.own_checksum())
    (tmp_path / "manifest.json").write_text(json.dumps(asdict(manifest)))
    with serving(tmp_path) as server, serving(trained) as plain:
        found = open_model(server.url, k=2, averaged=True)
        assert same_bits(found, open_model(tmp_path, k=2, averaged=True))
        assert not same_bits(found, open_model(server.url, k=2))
        assert same_bits(found.grow(4), open_model(tmp_path, k=4, averaged=True))
        with pytest.raises(UserError, match="has no running average"):
            open_model(plain.url, averaged=True)


def test_weights_in_several_files(folders: Path, tmp_path: Path) -> None:
    tensors = load_file(folders / "plain/16" / WEIGHTS)
    (tmp_path / "config.json").write_bytes((folders / "plain/16/config.json").read_bytes())
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with serving(tmp_path) as server:
        assert same_bits(open_model(server.url, k=2), open_model(folders / "plain/2"))
        assert open_tokenizer(server.url).name == "bytes"
        index["weight_map"][names[0]] = "../a.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"has no model\.safetensors, nor"):
            open_model(server.url, k=2)


@pytest.mark.parametrize("lie", ["short", "header", "shape", "missing", "nan", "huge", "larger"])
def test_what_is_wrong_is_named(folders: Path, tmp_path: Path, lie: str) -> None:
    (tmp_path / "config.json").write_bytes((folders / "plain/16/config.json").read_bytes())
    tensors, path, name = load_file(folders / "plain/16" / WEIGHTS), tmp_path / WEIGHTS, PREFIX + "embedding_VD"
    if lie == "shape":
        tensors[name] = tensors[name][:9]
    elif lie == "missing":
        del tensors[name]
    elif lie == "nan":
        tensors[name][0, 0] = torch.nan
    elif lie == "larger":
        told = json.loads((tmp_path / "config.json").read_bytes())
        told["megassm"]["model"]["vocab_size"] = 10**7
        (tmp_path / "config.json").write_text(json.dumps(told))
    save_file(tensors, path)
    raw = path.read_bytes()
    if lie == "short":
        path.write_bytes(raw[:-100_000])
    elif lie == "header":
        path.write_bytes(raw[:8] + raw[8:].replace(b"data_offsets", b"data_0ffsets", 1))
    elif lie == "huge":
        path.write_bytes((2**40).to_bytes(8, "little") + raw[8:])
    said = {
        "short": "its header says it is longer", "header": "not a safetensors file", "missing": "is not there",
        "shape": r"is \(9, 128\), expected \(257, 128\)", "nan": "embedding_VD is not finite",
        "huge": "a header of 1,0", "larger": "says a model of 2,",
    }  # fmt: skip
    with serving(tmp_path) as server, pytest.raises(UserError, match=said[lie]):
        open_model(server.url)


def test_an_address_without_a_model_is_named(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        with pytest.raises(UserError, match="no trained model there"):
            open_model(f"{server.url}/nothing")
        (tmp_path / "events.jsonl").write_text('{"kind": "checkpoint", "step": 7}\n')
        with pytest.raises(UserError, match="tells of no checkpoint that is there"):
            open_model(server.url)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_runs_are_those_of_a_slice(data: st.DataObject) -> None:
    whole = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    kept = tuple(data.draw(st.integers(1, size)) for size in whole)
    first = data.draw(st.integers(0, kept[0] - 1)) if kept[1:] == whole[1:] else 0
    numbers = np.arange(np.prod(whole)).reshape(whole)
    part = Part("", whole, kept, first)
    expected = numbers[tuple(slice(size) for size in kept)][first:]
    runs = list(part.runs())
    assert [number for begin, end in runs for number in range(begin, end)] == expected.ravel().tolist()
    assert expected.shape == part.shape
    assert all(later[0] > earlier[1] for earlier, later in itertools.pairwise(runs)) or len(whole) > 1


def test_runs_are_joined_over_small_gaps_and_where_there_are_too_many() -> None:
    assert joined([]) == []
    assert joined([(0, 1000, None), (1010, 2000, None), (9000, 9100, None)]) == [(0, 2000), (9000, 9100)]
    many = [(1000 * place, 1000 * place + 1, None) for place in range(REQUESTS + 10)]
    many[300] = (300_000, 300_900, None)
    found = joined(many)
    assert len(found) == REQUESTS
    assert (300_000, 301_001) in found
