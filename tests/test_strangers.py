"""A folder that another has made does not act for whoever opens it: no file is written through a link, none is read
outside of it."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from ruamel.yaml.error import YAMLError

from megassm.checkpoint.format import FORMAT, MANIFEST, checksum_of, read_checkpoint
from megassm.cli.arguments import budget_list, print_line, print_table, refuse
from megassm.cli.progress import LineProgress
from megassm.config.load import load_config
from megassm.config.source import ConfigError
from megassm.data.prepare.tar import tar_members
from megassm.data.stores import open_store
from megassm.data.task import load_task
from megassm.data.tasks.from_files import items
from megassm.errors import UserError, visible
from megassm.files import open_own, write_atomically
from megassm.guarded import LINE_BYTES, check_tar, load_columns, parse_json, parse_yaml
from megassm.report.live import LiveRun
from megassm.report.run_files import read_knobs
from megassm.report.sweep_files import plot_steps
from megassm.report.terminal import frame
from megassm.run.events import append_event, read_events
from megassm.run.failures import check_failures
from megassm.run.left_out import read_left_out
from megassm.run.lines import read_line
from megassm.run.records import RecordFile, cut_after, is_record, newest_record, read_records
from tests.conftest import ROOT


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("mine", encoding="utf-8")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_temporary_file_is_no_link(run_dir: Path, victim: Path) -> None:
    (run_dir / "config.yaml.tmp").symlink_to(victim)
    write_atomically(run_dir / "config.yaml", b"ours")
    assert (run_dir / "config.yaml").read_text(encoding="utf-8") == "ours"
    assert victim.read_text(encoding="utf-8") == "mine"
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(victim)
    write_atomically(run_dir / "config.yaml", b"ours")
    assert victim.read_text(encoding="utf-8") == "mine", "a link at the final name is replaced"


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock"])
def test_what_is_appended_to_is_no_link(name: str, run_dir: Path, victim: Path) -> None:
    (run_dir / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        open_own(run_dir / name, "a+")
    append_event(run_dir, "stop", 1, "text", {})
    if name == "metrics.jsonl":
        with pytest.raises(OSError, match="symbolic link"):
            RecordFile(run_dir / name, print)
    assert victim.read_text(encoding="utf-8") == "mine"


def write_manifest(folder: Path, files: object) -> None:
    folder.mkdir(exist_ok=True)
    facts = {"format": FORMAT, "step": 1, "tokens": 1, "updates": 1, "mesh": {}, "identity": {}, "config": {}}
    text = json.dumps({**facts, "files": files, "checksum": checksum_of({**facts, "files": files})})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../victim", "a/../../victim", "x", "weights-00001-of-00001.safetensors\n"]
)
def test_a_manifest_names_files_of_its_checkpoint_only(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path / "step", {name: [4, 0]})
    with pytest.raises(UserError, match="is not a checkpoint's; it is not opened"):
        read_checkpoint(tmp_path / "step")


def test_a_checkpoint_is_not_read_through_a_link(tmp_path: Path, victim: Path) -> None:
    name = "weights-00001-of-00001.safetensors"
    write_manifest(tmp_path / "step", {name: [4, 0]})
    (tmp_path / "step" / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a link that leads out of"):
        read_checkpoint(tmp_path / "step")
    os.rename(tmp_path / "step", tmp_path / "real")
    (tmp_path / "real" / name).unlink()
    (tmp_path / "real" / name).write_text("mine", encoding="utf-8")
    (tmp_path / "step").symlink_to(tmp_path / "real")
    assert read_checkpoint(tmp_path / "step").manifest.step == 1, "the folder itself may be one"


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[" * 5000, '{"files": 1e999}', "\xff", json.dumps({"format": FORMAT, "files": {"a": [1]}})]
)
def test_a_manifest_is_what_it_should_be(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="use another checkpoint"):
        read_checkpoint(tmp_path)


ROWS = [b'{"step": 1, "loss": 2.5}\n', b'{"step": 2, "loss": 2.4, "tokens": 20}\n']
NO_ROWS = [
    b"[[[\n", b"[" * 2000 + b"\n", b"\xff\xfe\n", b"{}\n", b'{"step": 1e999}\n', b'{"step": "x"}\n', b'{"step": 0}\n',
    b'{"step": 3, "loss": "low"}\n', b'{"step": 3, "tokens": [1]}\n', b'{"step": 3, "valid": {"a": 1}}\n',
    b'{"step": 3, "valid": 5}\n', b'{"step": 3, "step_s": NaN}\n', b'{"step": ' + b"9" * 5000 + b"}\n",
    json.dumps({"step": 3, "phases_s": {str(n): 1.0 for n in range(100_000)}}).encode() + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("line", NO_ROWS, ids=lambda line: line[:20])
def test_a_line_that_is_no_row_is_passed_over(line: bytes, tmp_path: Path) -> None:
    """By watch, report and resume alike."""
    (tmp_path / "metrics.jsonl").write_bytes(ROWS[0] + line + ROWS[1] + line)
    assert [row["step"] for row in read_records(tmp_path)] == [1, 2]
    assert (newest_record(tmp_path / "metrics.jsonl") or {})["step"] == 2
    run = LiveRun(tmp_path)
    while run.look().read_share < 1:
        pass
    assert run.history.records == 2
    cut_after(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == ROWS[0]


def test_a_line_without_an_end_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(ROWS[0] + b"x" * (3 * LINE_BYTES) + b"\n" + ROWS[1])
    assert [row["step"] for row in read_records(tmp_path)] == [1, 2]
    run = LiveRun(tmp_path)
    while run.look().read_share < 1:
        pass
    assert run.history.records == 2


BOMB = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
NO_YAML = [
    BOMB,
    "[" * 1500,
    "a: &a [*a]",
    "\xff",
    "a: !!bool 5",
    "a: !!python/object:os.system x",
    "x: 1\n" * 60_000,
    "- " * 900,
]


@pytest.mark.parametrize("text", NO_YAML, ids=lambda text: text[:20])
def test_a_configuration_that_is_a_bomb_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)
    assert len(str(read_knobs(tmp_path))) < 1000, "as watch and report read it"


@pytest.mark.parametrize(
    "override",
    ["train.compile=!!bool 5", "train.steps=-0x" + "F" * 5000, "train.steps=" + "[" * 3000,
     "model.n_layers=0xffffffffffffffffffff",
     "model.n_layers=1000000000", "model.vocab_size=10000000000", "model.seq_len=1000000000", "train.steps=&a [*a]",
     "train.steps=" + "9" * 5000, "train.steps=!!int x", "train.steps=!!timestamp x", "train.steps=*a",
     "model.pattern=" + "S" * 99_999],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_override_is_no_bomb(override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(ROOT / "configs/tiny.yaml", [override])


@pytest.mark.parametrize("name", ["failures.jsonl", "failure.txt", "environment.json", "events.jsonl"])
@pytest.mark.parametrize(
    "text", [b"{}\n", b"[]\n", b"\xff", b"[" * 2000, b'{"failed": "x"}\n', b'{"time": 1e300, "kind": 1}\n']
)
def test_what_lies_in_a_run_directory_may_be_anything(name: str, text: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text)
    check_failures(tmp_path, tmp_path / "metrics.jsonl", tmp_path / "none", 3)
    run = LiveRun(tmp_path).look()
    Console(file=io.StringIO(), width=100).print(frame(run, 100, 50))
    assert list(read_events(tmp_path)) == []


NO_LEFT_OUT = [
    '{"step": 1}',
    '[{"step": 1}]',
    '[{"step": -1, "batches": 2}]',
    "[[[",
    "\xff",
    '[{"step": 1e999, "batches": 1}]',
]


@pytest.mark.parametrize(
    "text", [*NO_LEFT_OUT, "[" * 5000, '[{"step": "1", "batches": 1}]'], ids=lambda text: text[:20]
)
def test_files_beside_the_journal_are_what_they_should_be(text: str, tmp_path: Path) -> None:
    for name in ("left_out.json", "task.json", "step-00000001.json"):
        (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"left_out\.json: .*and write them again"):
        read_left_out(tmp_path)
    with pytest.raises(UserError, match=r"task\.json: .*make the data set again"):
        load_task(tmp_path / "task.json")
    with pytest.raises(UserError, match=r"step-00000001\.json: .*the checkpoint is measured again"):
        plot_steps(tmp_path)


@pytest.mark.parametrize(
    "line", ["{}", "[]", "[" * 5000, "\xff", '{"text": 5, "label": "a"}', '{"text": "\\ud800", "label": "a"}']
)
def test_a_line_of_a_labelled_text_is_one(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": 1}\n' + line, encoding="latin-1")
    with pytest.raises(UserError, match=r"x\.jsonl:2: "):
        items("text", [tmp_path / "x.jsonl"])


def test_pathfinder_names_images_of_its_folder_only(tmp_path: Path) -> None:
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "0.npy").write_text("../.. passwd 0 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="does not lie in its folder"):
        items("pathfinder", [tmp_path])


def test_an_event_is_not_glued_to_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"time": 1, "kind": "stop", "te')
    for step in (1, 2):
        append_event(tmp_path, "stop", step, "text", {})
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2]


@pytest.mark.parametrize("words", ["1-999999999", "9" * 5000, "1-2-3", "100001"])
def test_budgets_have_a_limit(words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        budget_list(words)


@pytest.mark.parametrize("url", ["http://[::1", "http://host:port/x", "s3://[x", "https://host:99999/set"])
def test_what_is_no_url_is_said(url: str) -> None:
    with pytest.raises(UserError, match="not a URL"):
        open_store(url)


def test_what_is_printed_shows_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables, lines, progress and refusals: every way that text from outside takes to a terminal."""
    text = "a\x1b]0;title\x07\x9b2J\u202eb"
    print_table(text, [{"k": 1, text: text}, {"k": 2, text: text}])
    print_line(text)
    print_line(text, sys.stderr)
    LineProgress().note(text)
    with pytest.raises(SystemExit):
        refuse(text, 2)
    said = capsys.readouterr()
    assert not re.search("[\x07\x1b\x80-\x9f\u202e]", said.out + said.err)
    assert said.out.count("\\x1b") >= 5
    assert said.err.count("\\x1b]0;title\\x07\\x9b2J\\u202eb") == 3


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "\x9b31m", "a\u202eb", "\rfaked", "\x00"])
def test_control_characters_are_seen_and_not_obeyed(text: str) -> None:
    for shown in (visible(text), str(UserError(text))):
        assert shown.isprintable()
        assert shown != text
    assert visible("a\tb\nc \u4e16 \U0001f642") == "a\tb\nc \u4e16 \U0001f642"


def packed(raw: bytes, name: str = "0.u16", **changes: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(raw)
    for key, value in changes.items():
        setattr(header, key, value)
    return header.tobuf(tarfile.PAX_FORMAT) + raw + b"\0" * (-len(raw) % 512)


@pytest.mark.parametrize(
    "content",
    [
        packed(b"x", size=6_000_000_000),
        packed(b"x", type=tarfile.GNUTYPE_SPARSE),
        packed(b"x", pax_headers={"GNU.sparse.size": "6000000000", "GNU.sparse.major": "1"}),
        packed(b"x", pax_headers={"size": "6000000000"}),
        packed(b"x", type=tarfile.XHDTYPE, size=2**21) + b"\0" * 2**21,
        packed(b"a") + b"\1" * 512,
        b"\1" * 1024,
    ],
    ids=["beyond", "sparse", "PAX sparse", "PAX size", "attributes", "second header", "no header"],
)
def test_a_tar_file_holds_what_its_bytes_hold(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content + b"\0" * 10240)
    with pytest.raises(UserError, match="not a sound tar file"):
        list(tar_members(path))


DTYPES = {"shard": np.dtype("<u4"), "offset": np.dtype("<u8")}


def npz(compressed: bool = False, **columns: object) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **columns)  # type: ignore[operator]
    return file.getvalue()


@pytest.mark.parametrize(
    "raw",
    [
        npz(True, shard=np.zeros(10**6, "<u4"), offset=np.zeros(10**6, "<u8")),
        npz(shard=np.zeros(3, "<u4")),
        npz(shard=np.zeros(3, "<u4"), offset=np.zeros(3, "<f8")),
        npz(shard=np.zeros(3, "<u4"), offset=np.zeros(2, "<u8")),
        npz(shard=np.zeros(3, "<u4"), offset=np.array([None, {}], dtype=object)),
        b"",
        b"PK\3\4junk",
    ],
    ids=["zeros", "missing", "type", "length", "objects", "empty", "junk"],
)
def test_arrays_are_what_they_should_be(raw: bytes) -> None:
    with pytest.raises(UserError, match=r"index\.npz"):
        load_columns(raw, DTYPES, "index.npz")


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_end_in_a_message(data: st.DataObject) -> None:
    """Flipped, cut and grown bytes of each kind."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    kind_of, whole = KINDS[kind]
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    with contextlib.suppress(*((UserError,) if kind in ("npz", "json", "row") else (ValueError, YAMLError))):
        kind_of(bytes(raw) or b"\0")


KINDS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "json": (lambda raw: parse_json(raw, "x"), b'{"a": [1, 2.5, {"b": "c\\u1234"}], "d": null}'),
    "row": (lambda raw: read_line(raw, is_record), ROWS[1]),
    "yaml": (lambda raw: parse_yaml(raw.decode("latin-1")), b"a: &x [1, 2]\nb: *x\nc: {d: !!int 3, e: 'f'}\n"),
    "npz": (lambda raw: load_columns(raw, DTYPES, "x"), npz(shard=np.zeros(3, "<u4"), offset=np.zeros(3, "<u8"))),
    "tar": (lambda raw: check_tar(io.BytesIO(raw), len(raw)), packed(b"abc") + packed(b"", pax_headers={"a": "b"})),
}  # fmt: skip
