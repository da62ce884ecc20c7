"""Preparation: same bytes whatever happens on the way, nothing lost, clear refusals; and both tools."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from megassm.data.blocks import local_fetch, read_block
from megassm.data.dataset import own_tokenizer
from megassm.data.index import ShardSet, ShardSizes
from megassm.data.prepare import parts, shuffle, units, work
from megassm.data.prepare import pipeline as prepare_module
from megassm.data.prepare import text as text_module
from megassm.data.prepare.pipeline import Prepared, PrepareJob, prepare
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.verify import verify
from megassm.data.tokenizer.base import TokenizerSpec, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from tests.conftest import run_python
from tests.test_hugging_face_tokenizer import gpt2_like

SIZES = ShardSizes(shard_tokens=20_000, block_tokens=4000, member_tokens=1000)


class Notes:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.updates: list[int] = []

    def start(self, phase: str, total_bytes: int) -> None:
        self.total_bytes = total_bytes

    def update(self, done_bytes: int) -> None:
        self.updates.append(done_bytes)

    def note(self, message: str) -> None:
        self.notes.append(message)


def some_texts(count: int = 300) -> list[str]:
    random = np.random.default_rng(0)
    words = ["alpha", "b\u00e9ta", "gamma\n", "  delta", "\u4e16\u754c", "\tx = 1\r\n"]
    return [f"{n} " + " ".join(random.choice(words, random.integers(1, 60))) for n in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """300 documents in three formats, 20 of them twice, and 5 empty ones."""
    directory, texts = tmp_path / "corpus", some_texts()
    (directory / "deep").mkdir(parents=True)
    for n, text in enumerate(texts[:100]):
        (directory / "deep" / f"{n:03d}.txt").write_bytes(text.encode())
    lines = [json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts[100:200] + texts[:20])]
    (directory / "a.jsonl").write_text("".join(lines) + "\n")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts[200:] + [" \n"] * 5]
    (directory / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    (directory / "ignored.py").write_text("not asked for")
    (directory / ".hidden.txt").write_text("hidden")
    return directory


def job_of(corpus: Path, output: Path, **changes: object) -> PrepareJob:
    job = PrepareJob(TextSource((corpus,)), output, sizes=SIZES, valid_fraction=0.2, part_bytes=3000)
    return replace(job, **changes)  # type: ignore[arg-type]


def texts_of(shards: ShardSet, tokenizer: str | Path = "bytes") -> list[str]:
    blocks = (read_block(shards, block, local_fetch(shards.directory)) for block in range(len(shards.blocks)))
    ids = np.concatenate(list(blocks))
    ends = np.flatnonzero(ids == shards.eod)
    assert ends[-1] == ids.size - 1
    return [load_tokenizer(tokenizer).decode(document.tolist()) for document in np.split(ids, ends + 1)[:-1]]


def tree_of(directory: Path) -> dict[str, bytes]:
    """Every file but the one for people, which holds a date and the directory's name."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "dataset.md")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def done(job: PrepareJob) -> Prepared:
    return prepare(job, Notes())


def test_every_document_arrives_once_in_one_split(corpus: Path, tmp_path: Path) -> None:
    prepared = done(job_of(corpus, tmp_path / "out"))
    train, valid = (texts_of(prepared.splits[split]) for split in ("train", "valid"))
    texts = some_texts()
    assert Counter(train + valid) == Counter(texts + texts[:20])
    assert not set(train) & set(valid)
    assert 0.1 < len(valid) / 320 < 0.3
    assert train != sorted(train, key=texts.index)
    assert {name: count for name, count in prepared.filtered.items() if count} == {"empty": 5}
    assert not prepared.was_there
    assert sum(shards.text_bytes for shards in prepared.splits.values()) == sum(len(t.encode()) for t in train + valid)
    for shards in prepared.splits.values():
        assert verify(shards) == []
    assert not (tmp_path / "out" / ".partial").exists()


def test_the_bytes_do_not_depend_on_workers_or_on_the_memory_for_the_shuffle(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(job_of(corpus, tmp_path / "one"))
    done(job_of(corpus, tmp_path / "three", workers=3))
    for module, name in ((work, "BUCKET_BYTES"), (work, "RANGE_ROWS"), (shuffle, "RUN_BYTES")):
        monkeypatch.setattr(module, name, {"RANGE_ROWS": 20}.get(name, 2000))
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    done(job_of(corpus, tmp_path / "tight", workers=2))
    assert tree_of(tmp_path / "one") == tree_of(tmp_path / "three") == tree_of(tmp_path / "tight")


@pytest.mark.parametrize("workers", [1, 3])
def test_progress_is_of_work_done_and_reaches_its_end(corpus: Path, tmp_path: Path, workers: int) -> None:
    class ByPhase(Notes):
        def start(self, phase: str, total_bytes: int) -> None:
            self.updates = []
            phases.append((total_bytes, self.updates))

    phases: list[tuple[int, list[int]]] = []
    prepare(job_of(corpus, tmp_path / "out", workers=workers), ByPhase())
    assert len(phases) == 3
    for total_bytes, updates in phases:
        assert updates == sorted(updates)
        assert updates[-1] == total_bytes
    assert len(phases[0][1]) > 5


def test_another_seed_shuffles_the_same_split_otherwise(corpus: Path, tmp_path: Path) -> None:
    first, other = (done(job_of(corpus, tmp_path / str(seed), seed=seed)).splits for seed in (0, 1))
    for split in ("train", "valid"):
        left, right = texts_of(first[split]), texts_of(other[split])
        assert left != right
        assert sorted(left) == sorted(right)


def test_a_trained_tokenizer_is_used_and_copied(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "a.model"
    model.write_bytes(train_sentencepiece(some_texts(), vocab_size=285))
    prepared = done(job_of(corpus, tmp_path / "out", tokenizer=TokenizerSpec(str(model)), workers=2))
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    train, valid = (texts_of(prepared.splits[split], model) for split in ("train", "valid"))
    texts = some_texts()
    assert Counter(train + valid) == Counter(texts + texts[:20])
    assert prepared.splits["train"].tokenizer_sha256 == load_tokenizer(model).sha256
    assert prepared.splits["train"].tokens < prepared.splits["train"].text_bytes


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_json_is_used_and_kept_with_its_end_of_document(corpus: Path, tmp_path: Path, workers: int) -> None:
    backend = gpt2_like(some_texts())
    backend.add_special_tokens(["<|stop|>"])
    backend.save(str(tmp_path / "a.json"))
    spec = TokenizerSpec(str(tmp_path / "a.json"), "<|stop|>")
    prepared = done(job_of(corpus, tmp_path / "out", tokenizer=spec, workers=workers))
    kept = own_tokenizer(tmp_path / "out")
    assert load_tokenizer(kept).sha256 == load_tokenizer(spec).sha256 == prepared.splits["valid"].tokenizer_sha256
    texts = [text for split in ("train", "valid") for text in texts_of(prepared.splits[split], kept)]
    assert Counter(texts) == Counter(some_texts() + some_texts()[:20])
    with pytest.raises(UserError, match=r"from another job \(other: tokenizer\)"):
        done(job_of(corpus, tmp_path / "out", tokenizer=TokenizerSpec(spec.name)))


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_left_out_wherever_they_stand(corpus: Path, tmp_path: Path, workers: int) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in reversed(some_texts())]
    (corpus / "c.jsonl").write_text("".join(lines))
    prepared = done(job_of(corpus, tmp_path / "out", deduplicate=True, workers=workers))
    train, valid = (texts_of(prepared.splits[split]) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(some_texts())
    assert prepared.filtered["duplicate"] == 320
    # what is left is exactly what the documents without duplicates give
    (corpus / "c.jsonl").unlink()
    lines = (corpus / "a.jsonl").read_text().splitlines(keepends=True)
    (corpus / "a.jsonl").write_text("".join(lines[:100]))
    done(job_of(corpus, tmp_path / "without", seed=0))
    for split in ("train", "valid"):
        assert tree_of(tmp_path / "out" / split) == tree_of(tmp_path / "without" / split)


def test_filters_are_counted_and_the_card_says_so(corpus: Path, tmp_path: Path) -> None:
    source = TextSource((corpus,), min_document_bytes=100, max_document_bytes=300)
    job = job_of(corpus, tmp_path / "out", source=source, licence="CC BY 4.0, see example.org")
    prepared = done(job)
    sizes = [len(text.encode()) for text in some_texts() + some_texts()[:20]]
    short, long = sum(size < 100 for size in sizes), sum(size > 300 for size in sizes)
    assert short
    assert long
    assert (prepared.filtered["too short"], prepared.filtered["too long"]) == (short, long)
    kept = sum(shards.documents for shards in prepared.splits.values())
    assert kept == sum(100 <= size <= 300 for size in sizes)
    card = (tmp_path / "out" / "dataset.md").read_text()
    for line in (
        f"* documents too short: {short}",
        "* longest document (UTF-8 bytes): 300",
        f"* `{corpus}`",
        "Files: 1 .jsonl, 1 .jsonl.gz, 100 .txt; ",
        "* name: bytes",
        "CC BY 4.0, see example.org",
        f"`{prepared.splits['valid'].fingerprint}` |",
    ):
        assert line in card
    done(replace(job, licence=None))
    assert (tmp_path / "out" / "dataset.md").read_text() == card
    done(replace(job, licence="Public domain"))
    assert "Public domain" in (tmp_path / "out" / "dataset.md").read_text()


KILLED_RUN = """
import sys
from pathlib import Path
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.pipeline import PrepareJob, prepare
from megassm.data.index import ShardSizes
from megassm.data.prepare import shard_writer
import time

class Slow:
    def start(self, phase, total_bytes): print("phase", phase, flush=True)
    def update(self, done_bytes): time.sleep({tokenize_seconds})
    def note(self, message): print(message, flush=True)

write_member = shard_writer.OpenShard.write_member
def slow_write_member(*arguments):
    time.sleep({write_seconds})
    write_member(*arguments)
shard_writer.OpenShard.write_member = slow_write_member

if __name__ == "__main__":
    sizes = ShardSizes(shard_tokens=20_000, block_tokens=4000, member_tokens=1000)
    source = TextSource((Path(sys.argv[1]),))
    job = PrepareJob(source, Path(sys.argv[2]), sizes=sizes, valid_fraction=0.2, part_bytes=3000, workers=2)
    prepare(job, Slow())
"""


def children_of(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"PPid:\t{process}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


def wait_until(holds: Iterator[bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    for held in holds:
        if held:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("phase", ["tokenize", "write"])
def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, tmp_path: Path, phase: str) -> None:
    done(job_of(corpus, tmp_path / "whole"))
    output, script = tmp_path / "killed", tmp_path / "run.py"
    slow = {"tokenize_seconds": 0, "write_seconds": 0, f"{phase}_seconds": 0.1}
    script.write_text(_fill(KILLED_RUN, slow))
    run = subprocess.Popen([sys.executable, script, corpus, output])
    pattern = "part-*.rows.npy" if phase == "tokenize" else "shuffle-*/train/shard-*.tar"
    wait_until(len(list((output / ".partial").glob(pattern))) >= 1 for _ in iter(int, 1))
    workers = children_of(run.pid)
    run.send_signal(signal.SIGKILL)
    run.wait()
    parts = {path: path.stat().st_mtime_ns for path in (output / ".partial").glob("part-*.rows.npy")}
    assert parts
    assert not (output / "train").exists()
    wait_until(not any(map(is_running, workers)) for _ in iter(int, 1))

    notes = Notes()
    kept: list[bool] = []
    publish = prepare_module._publish

    def publish_and_look(*arguments: object) -> None:
        kept.extend(path.stat().st_mtime_ns == written for path, written in parts.items())
        publish(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "_publish", publish_and_look)
        prepare(job_of(corpus, output), notes)
    assert kept
    assert all(kept)
    assert "going on with the unfinished work" in notes.notes[-1]
    assert tree_of(output) == tree_of(tmp_path / "whole")


def _fill(script: str, values: dict[str, float]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: str(values[match[1]]), script)


def is_running(process: int) -> bool:
    status = Path(f"/proc/{process}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False


def test_a_killed_worker_is_a_refusal_with_a_way_out(corpus: Path, tmp_path: Path) -> None:
    class Killer(Notes):
        def update(self, done_bytes: int) -> None:
            for child in children_of(os.getpid()):
                name = Path(f"/proc/{child}/cmdline")
                if name.exists() and b"spawn_main" in name.read_bytes():
                    os.kill(child, signal.SIGKILL)

    with pytest.raises(
        UserError, match=r"worker process was killed or cannot start.*fewer --workers: finished parts are kept"
    ):
        prepare(job_of(corpus, tmp_path / "out", workers=2), Killer())


@pytest.mark.parametrize("mended", ["file", "flag", "gone"])
@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_late_error_finished_parts_are_kept(corpus: Path, tmp_path: Path, mended: str, workers: int) -> None:
    output = tmp_path / "out"
    good = "".join(json.dumps({"text": text + " more"}) + "\n" for text in some_texts())
    (corpus / "z.jsonl").write_text(good + "{\n")
    with pytest.raises(UserError, match=r"z\.jsonl:301: not JSON.*--on-bad-record skip"):
        done(job_of(corpus, output, workers=workers))
    parts = {path: path.stat().st_mtime_ns for path in (output / ".partial").glob("part-*.rows.npy")}
    assert len(parts) > 20
    source = TextSource((corpus,), on_bad_record="skip" if mended == "flag" else "raise")
    if mended == "file":
        (corpus / "z.jsonl").write_text(good)
    elif mended == "gone":
        (corpus / "z.jsonl").unlink()
    notes = Notes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module.shutil, "rmtree", lambda *_, **__: None)  # so that there is something to look at
        prepared = prepare(job_of(corpus, output, source=source), notes)
    assert re.search(rf"going on with the unfinished work in .*: {len(parts)} finished parts", notes.notes[-1])
    kept = [path.stat().st_mtime_ns == written for path, written in parts.items()]
    assert all(kept)
    count = sum(shards.documents for shards in prepared.splits.values())
    assert count == 320 + 300 * (mended != "gone")
    done(job_of(corpus, tmp_path / "clean", source=source))
    for split in ("train", "valid"):
        assert tree_of(output / split) == tree_of(tmp_path / "clean" / split)


def test_unfinished_work_of_another_tokenizer_is_discarded_and_said(corpus: Path, tmp_path: Path) -> None:
    (corpus / "z.jsonl").write_text('{"text": "x"}\n{\n')
    with pytest.raises(UserError, match=r"z\.jsonl:2: not JSON"):
        done(job_of(corpus, tmp_path / "out"))
    (corpus / "z.jsonl").unlink()
    (tmp_path / "a.model").write_bytes(train_sentencepiece(some_texts(), vocab_size=285))
    notes = Notes()
    prepare(job_of(corpus, tmp_path / "out", tokenizer=TokenizerSpec(str(tmp_path / "a.model"))), notes)
    assert re.search(r"discarding unfinished work in .* \(other: tokenizer\)", notes.notes[-1])


def test_a_file_that_changes_while_it_is_read_is_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = parts.PartStore.make

    def make_and_touch(self: parts.PartStore, part: parts.Part) -> None:
        make(self, part)
        (corpus / "a.jsonl").write_text('{"text": "another"}\n')

    monkeypatch.setattr(parts.PartStore, "make", make_and_touch)
    with pytest.raises(UserError, match=r"a\.jsonl: was changed while it was read"):
        done(job_of(corpus, tmp_path / "out"))


def test_copies_of_a_text_stand_anywhere(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(400)] + ["copy"] * 400
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    for part_bytes in (200, 10**6):  # in many parts, and in one
        job = job_of(tmp_path / "a.jsonl", tmp_path / str(part_bytes), part_bytes=part_bytes, seed=3)
        prepared = done(job)
        found = [texts_of(prepared.splits[split]) for split in ("train", "valid")]
        together = max(found, key=lambda texts: texts.count("copy"))
        assert sorted([*found[0], *found[1]]) == sorted(texts)
        runs = [len(list(run)) for text, run in groupby(together) if text == "copy"]
        assert max(runs) < 20
        assert prepared.repeated == 399
    assert tree_of(tmp_path / "200") == tree_of(tmp_path / "1000000")


def test_a_long_document_is_divided_and_stays_on_one_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "PIECE_BYTES", 2000)
    monkeypatch.setattr(text_module, "NEAR_BYTES", 1000)
    long = ["".join(f"{n} line {line}\n" for line in range(700)) for n in range(6)]
    short = [f"short {n}" for n in range(60)]
    for n, text in enumerate(long[:3]):
        (tmp_path / f"{n}.txt").write_text(text)
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in long[3:] + short))
    prepared = done(job_of(tmp_path, tmp_path / "out"))
    assert sum(shards.documents for shards in prepared.splits.values()) == 66
    sides: dict[int, set[str]] = {}
    for split, shards in prepared.splits.items():
        assert int(shards.blocks["tokens"].max()) < 4000 + 1000 + 2001
        assert verify(shards) == []
        blocks = (read_block(shards, block, local_fetch(shards.directory)) for block in range(len(shards.blocks)))
        text = load_tokenizer("bytes").decode(np.concatenate(list(blocks)).tolist())
        for number, _ in re.findall(r"(\d+) line (\d+)\n", text):
            sides.setdefault(int(number), set()).add(split)
    assert [len(sides[n]) for n in range(6)] == [1] * 6
    doubled = done(replace(job_of(tmp_path, tmp_path / "out2", deduplicate=True), source=TextSource(
        (tmp_path / "0.txt", tmp_path / "rest.jsonl", copy_of(tmp_path / "0.txt")))))  # fmt: skip
    assert doubled.filtered["duplicate"] == 1
    assert sum(shards.documents for shards in doubled.splits.values()) == 64


def copy_of(path: Path) -> Path:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    return copy


def test_a_full_disk_and_names_in_latin_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9j\xe0"))
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n' * 30 + '{"text": "two"}\n')

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "part-x")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "save_durably", full)
        with pytest.raises(UserError, match=r"--output .*: the disk is full \([\d,]+ MiB free\).*run the same command"):
            done(job_of(folder, folder / "out"))
    assert done(job_of(folder, folder / "out")).splits["train"].documents in (1, 30)
    assert "d\\xe9j\\xe0" in (folder / "out" / "dataset.md").read_text()


def test_a_finished_job_is_not_done_again_and_another_is_refused(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done(job_of(corpus, output))
    before = tree_of(output)
    again = done(job_of(corpus, output, workers=2))
    assert again.was_there
    assert again.filtered["empty"] == 5
    with pytest.raises(UserError, match=r"from another job \(other: seed\); give another directory or remove"):
        done(job_of(corpus, output, seed=1))
    (corpus / "deep" / "000.txt").write_text("changed")
    with pytest.raises(UserError, match=r"\(other: files\)"):
        done(job_of(corpus, output))
    assert tree_of(output) == before


def test_a_run_overtaken_by_another_leaves_its_result_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, locked = tmp_path / "out", prepare_module._locked

    def overtaken(path: Path) -> object:
        monkeypatch.setattr(prepare_module, "_locked", locked)
        done(job_of(corpus, output, seed=1))
        return locked(path)

    monkeypatch.setattr(prepare_module, "_locked", overtaken)
    with pytest.raises(UserError, match=r"from another job \(other: seed\)"):
        done(job_of(corpus, output, seed=0))
    assert done(job_of(corpus, output, seed=1)).was_there


def test_output_refusals(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds 'train', not made by this tool"):
        done(job_of(corpus, tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*file/out: cannot write there: Not a directory"):
        done(job_of(corpus, tmp_path / "file" / "out"))
    (tmp_path / "busy" / ".partial").mkdir(parents=True)
    with open(tmp_path / "busy" / ".partial" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing it"):
            done(job_of(corpus, tmp_path / "busy"))


def test_few_documents_are_divided_by_position(tmp_path: Path) -> None:
    lines = [f"line {n:03d} of the caf\u00e9\n" for n in range(500)]
    (tmp_path / "a.txt").write_text("".join(lines))
    for fraction, count in ((None, 24), (0.1, 49)):  # the line in which the cut falls is for training
        splits = done(job_of(tmp_path / "a.txt", tmp_path / str(fraction), valid_fraction=fraction)).splits
        assert texts_of(splits["train"]) == ["".join(lines[:-count])]
        assert texts_of(splits["valid"]) == ["".join(lines[-count:])]
    two = [{"text": "one two three"}, {"text": "\u4e16\u754c"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in two))
    both = done(job_of(tmp_path / "b.jsonl", tmp_path / "two", valid_fraction=1e-9)).splits
    assert sorted(texts_of(both["train"])) == ["one two thre", "\u4e16"]
    assert sorted(texts_of(both["valid"])) == ["e", "\u754c"]
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(UserError, match=r"cannot be divided into training and validation.*--valid-fraction 0"):
        done(job_of(tmp_path / "c.txt", tmp_path / "one", valid_fraction=None))
    assert not (tmp_path / "one").exists()
    alone = job_of(tmp_path / "c.txt", tmp_path / "one", valid_fraction=0)
    assert list(done(alone).splits) == ["train"]


def test_job_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"valid fraction 1\.5: it must be in \[0, 1\)"):
        job_of(tmp_path, tmp_path, valid_fraction=1.5)
    with pytest.raises(UserError, match="workers is 0, it must be at least 1"):
        job_of(tmp_path, tmp_path, workers=0)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"no text in 1 files \(1 empty\)"):
        done(job_of(tmp_path / "a.txt", tmp_path / "out"))


def test_the_tool(corpus: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "out", tmp_path / "table.json"
    command = ("tools/prepare_data.py", "--input", str(corpus), "--output", str(output), "--json", str(table))
    first, again = run_python(*command), run_python(*command, "--workers", "1")
    said = first.stderr.splitlines()
    assert re.fullmatch(r"left out: 2 files: 1 named \*\.py \(.*\), 1 hidden \(.*\)", said[0])
    assert said[1:] == ["20 documents repeat the text of another; --deduplicate leaves such out"]
    assert "nothing to do" in again.stderr
    rows = {row["split"]: row for row in json.loads(table.read_text())}
    assert rows["train"]["documents"] + rows["valid"]["documents"] == 320
    assert rows["left out: empty"]["documents"] == 5
    for option, message in (
        (("--input", ""), "argument --input: is empty; give a path"),
        (("--output", ""), "argument --output: is empty; give a path"),
    ):
        bad = run_python(*command, *option, check=False)
        assert bad.returncode == 2
        assert message in bad.stderr
    for option, message in (
        (("--licence", "no.txt"), "error: --licence no.txt: no such file; give a file, or the licence's text"),
        (("--eod-token", "x"), "error: --eod-token is for a tokenizer.json"),
    ):
        bad = run_python(*command, *option, check=False)
        assert bad.returncode == 1
        assert message in bad.stderr

    refused = run_python(*command[:3], "--output", str(tmp_path / "x"), "--tokenizer", "no.model", check=False)
    assert refused.returncode == 1
    assert re.fullmatch(r"error: tokenizer no\.model: No such file.*train_tokenizer\.py\n", refused.stderr)
    assert not (tmp_path / "x").exists()
    assert "\nexample:\n  python tools/prepare_data.py --input" in run_python(command[0], "--help").stdout
