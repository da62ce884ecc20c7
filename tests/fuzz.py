"""Mutates files of every kind that others may give us, and reads them.

    python -m tests.fuzz --inputs 50000

A reader takes what it is given or refuses it in a message. Any other exception is a fault; so is more than `HANG_S`,
and, of a kind with a checksum, a file that says something else than before and is taken. "Forged" files have values of
wrong types and sizes under a checksum that fits.
"""

from __future__ import annotations

import copy
import gzip
import json
import pickle
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from megassm.checkpoint.exported import CONFIG, WEIGHTS, open_model_folder, write_model_folder
from megassm.checkpoint.format import FORMAT, MANIFEST, Manifest, _crc32, checksum_of, read_checkpoint
from megassm.cli.arguments import print_table, run_tool, tool_parser
from megassm.config.load import load_config
from megassm.config.model import ModelConfig
from megassm.config.source import ConfigError
from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import index_checksum, load_index, read_index
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.kinds import look_at
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.tar import tar_members
from megassm.data.task import load_task
from megassm.data.tasks.from_files import items
from megassm.data.tokenizer.base import BytesTokenizer, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from megassm.guarded import read_json
from megassm.model import build_model
from megassm.report.live import LiveRun
from megassm.report.run_files import read_knobs
from megassm.run.events import read_events
from megassm.run.failures import check_failures
from megassm.run.left_out import read_left_out
from megassm.run.lives import life_of
from megassm.run.records import newest_record, read_records
from megassm.slurm.request import Submitted, asked_before
from tests.conftest import ROOT
from tests.shard_sets import random_documents, write_documents

HANG_S = 10
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 2**63, -(2**70), 1e308, "", "x", "\x1b", "../x", [], {}, [[]], {"a": 1})
ODD_BYTES = (
    b"\xff",
    b"[" * 2000,
    b"1e999",
    b"9" * 5000,
    b"NaN",
    b"\0" * 600,
    b'"',
    b"{",
    b"\xed\xa0\x80",
    b"-1",
    b"null",
)
FIGURES = {"step": 1, "loss": 2.5, "tokens": 20, "step_s": 0.1, "valid": {"8": 2.0}, "phases_s": {"data": 0.1}}


@dataclass
class Kind:
    """One kind of file."""

    name: str
    path: Path
    read: Callable[[], Any]
    checked: bool = False
    """Whether a checksum covers it: what is read must then be what was written."""
    sign: Callable[[Any], Any] | None = None
    """Of a forged file: gives a JSON value the checksum that fits."""
    inputs: int = 0
    refused: int = 0
    longest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Up to six changes: bits, bytes, runs removed, doubled or cut off, and what parsers trip over."""
    raw = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        at, size = dice.randrange(len(raw) + 1), dice.randint(1, 60)
        match dice.randrange(6):
            case 0 if at < len(raw):
                raw[at] ^= 1 << dice.randrange(8)
            case 1:
                raw[at : at + 1] = dice.randbytes(1)
            case 2:
                del raw[at : at + size]
            case 3:
                raw[at:at] = raw[at : at + size] * dice.choice((1, 1, 1, 30))
            case 4:
                raw[at:at] = dice.choice(ODD_BYTES)
            case _ if dice.random() < 0.2:
                del raw[at:]
    return bytes(raw)


def forged(content: bytes, dice: random.Random, sign: Callable[[Any], Any]) -> bytes:
    """The JSON with odd values in one to three places."""
    value = json.loads(content)
    for _ in range(dice.randint(1, 3)):
        at = value
        while True:
            keys = list(at) if isinstance(at, dict) else range(len(at))
            key = dice.choice(list(keys)) if keys else None
            if key is None or not isinstance(at[key], dict | list) or not at[key] or dice.random() < 0.2:
                break
            at = at[key]
        if key is not None:
            at[key] = copy.deepcopy(dice.choice(ODD))
    return json.dumps(sign(value)).encode()


def try_one(kind: Kind, content: bytes, expected: Any) -> None:
    """Reads one mutated file, and notes what is wrong with that."""
    kind.path.write_bytes(content)
    began = time.perf_counter()
    signal.alarm(HANG_S)
    try:
        found = kind.read()
        if kind.checked and found != expected:
            kind.faults.append("taken, though it says something else")
    except (UserError, ConfigError):
        kind.refused += 1
    except BaseException as error:
        kind.faults.append(f"{type(error).__name__}: {str(error)[:100]}")
    finally:
        signal.alarm(0)
    kind.inputs += 1
    kind.longest_s = max(kind.longest_s, time.perf_counter() - began)


def fuzz(kinds: list[Kind], inputs: int, seed: int) -> None:
    """Spreads `inputs` evenly over the kinds."""
    dice = random.Random(seed)
    for kind in kinds:
        whole = kind.path.read_bytes()
        expected = kind.read()
        for _ in range(-(-inputs // len(kinds))):
            try_one(kind, forged(whole, dice, kind.sign) if kind.sign else mutated(whole, dice), expected)
        kind.path.write_bytes(whole)


def all_kinds(folder: Path) -> list[Kind]:
    """A sound file of each kind, below `folder`."""
    return [*_data_sets(folder), *_run_files(folder), *_models(folder), *_texts(folder)]


def _data_sets(folder: Path) -> list[Kind]:
    own = write_documents(folder / "set", random_documents(40)).directory
    shard = sorted(own.glob("*.tar"))[0]

    def facts() -> Any:
        found = read_index(own)
        return found.tokens, found.documents, found.text_bytes, found.eod, found.shards, found.blocks.tolist()

    def ids() -> list[list[int]]:
        shards = load_index(own)
        return [read_block(shards, n, local_fetch(own)).tolist() for n in range(len(shards.blocks))]

    def signed(index: Any) -> Any:
        return index | {"checksum": index_checksum(index)} if isinstance(index, dict) else index

    foreign = folder / "theirs.tar"
    foreign.write_bytes(shard.read_bytes())
    return [
        Kind("index.json", own / "index.json", facts, checked=True),
        Kind("index.json, forged", own / "index.json", facts, sign=signed),
        Kind("index.npz", own / "index.npz", facts, checked=True),
        Kind("shard", shard, ids, checked=True),
        Kind("another's tar", foreign, lambda: list(tar_members(foreign))),
    ]


def _run_files(folder: Path) -> list[Kind]:
    run = folder / "run"
    run.mkdir()
    events = [
        {"time": 1.0, "step": n, "kind": kind, "text": "x", "figures": {}} for n, kind in enumerate(("start", "stop"))
    ]
    job = {"job_id": "12", "request": {"nodes": "2", "gpus_per_node": 8, "tasks_per_node": 8, "time": "24:00:00",
                                       "save_before_s": 180, "sbatch": ["partition=gpu"]}}  # fmt: skip
    contents = {
        "metrics.jsonl": "".join(json.dumps(FIGURES | {"step": step}) + "\n" for step in range(1, 20)),
        "events.jsonl": "".join(json.dumps(event) + "\n" for event in events),
        "failures.jsonl": '{"failed": 3, "reason": "x", "killed": true}\n{"began": 1.0}\n',
        "left_out.json": '[{"step": 400, "batches": 37}]',
        "config.yaml": (ROOT / "configs/tiny.yaml").read_text(encoding="utf-8"),
        "job.json": json.dumps(job),
    }
    for name, text in contents.items():
        (run / name).write_text(text, encoding="utf-8")

    def journal() -> None:
        read_records(run)
        newest_record(run / "metrics.jsonl")
        LiveRun(run).look()

    def asked() -> None:
        asked_before(read_json(run / "job.json", Submitted, limit=2**20).request, run / "job.json")

    return [
        Kind("metrics.jsonl", run / "metrics.jsonl", journal),
        Kind("events.jsonl", run / "events.jsonl", lambda: (list(read_events(run)), life_of(run))),
        Kind("failures.jsonl", run / "failures.jsonl", lambda: check_failures(run, run / "none", run / "none", None)),
        Kind("left_out.json", run / "left_out.json", lambda: read_left_out(run)),
        Kind("config.yaml", run / "config.yaml", lambda: (read_knobs(run), load_config(run / "config.yaml"))),
        Kind("job.json", run / "job.json", asked),
        Kind("job.json, forged", run / "job.json", asked, sign=lambda value: value),
    ]


def _models(folder: Path) -> list[Kind]:
    checkpoint, exported = folder / "step-00000001", folder / "export"
    checkpoint.mkdir()
    weights = checkpoint / "weights-00001-of-00001.safetensors"
    save_file({"a": torch.arange(12.0), "b": torch.zeros(3, 4)}, weights)
    files = {weights.name: (weights.stat().st_size, _crc32(weights))}
    manifest = Manifest(FORMAT, 1, 1, 1, {}, {}, {}, files)

    def signed(value: Any) -> Any:
        try:
            return value | {"checksum": checksum_of(value)}
        except Exception:
            return value

    (checkpoint / MANIFEST).write_text(json.dumps(signed(asdict(manifest))), encoding="utf-8")
    config = ModelConfig(vocab_size=257, d_model=16, n_layers=1, seq_len=64, num_channels=4, n_heads=2, d_ffn=16)
    exported.mkdir()
    write_model_folder(exported, build_model(config, 0), BytesTokenizer(), torch.float32)

    def manifest_of() -> Any:
        return read_checkpoint(checkpoint, check="weights").manifest

    def model() -> Any:
        opened = open_model_folder(exported)
        return opened.config, [(name, values.numpy().tobytes()) for name, values in opened.weights()]

    return [
        Kind("manifest.json", checkpoint / MANIFEST, manifest_of, checked=True),
        Kind("manifest.json, forged", checkpoint / MANIFEST, manifest_of, sign=signed),
        Kind("checkpoint's weights", weights, manifest_of, checked=True),
        Kind("exported weights", exported / WEIGHTS, model, checked=True),
        Kind("exported config.json", exported / CONFIG, model, checked=True),
    ]


def _texts(folder: Path) -> list[Kind]:
    library = [Path(random.__file__).read_text(encoding="utf-8")]
    tokenizer, task = folder / "tokenizer.model", folder / "task.json"
    tokenizer.write_bytes(train_sentencepiece(library, 400))
    task.write_text(
        '{"name": "x", "length": 64, "answers": ["a", "b"], "symbols": ["s"], "asked": 1}', encoding="utf-8"
    )
    labelled, packed, cifar = (folder / name for name in ("l.jsonl", "t.jsonl.gz", "data_batch_1"))
    labelled.write_text('{"text": "some text", "label": "a"}\n{"text": "more", "label": 1}\n', encoding="utf-8")
    packed.write_bytes(gzip.compress(b'{"text": "some text"}\n' * 20, mtime=0))
    kinds = [
        Kind("SentencePiece model", tokenizer, lambda: load_tokenizer(str(tokenizer)).encode(["some text"])),
        Kind("task.json", task, lambda: load_task(task)),
        Kind("labelled texts", labelled, lambda: [item.load() for item in items("text", [labelled])]),
        Kind("documents, gzip", packed, lambda: _documents(packed)),
    ]
    kinds += _json_tokenizer(folder / "tokenizer.json", library)
    rows = np.zeros((2, 3072), dtype=np.uint8)
    cifar.write_bytes(pickle.dumps({b"labels": [0, 1], b"data": rows}, protocol=2))
    kinds.append(Kind("CIFAR-10 batch", cifar, lambda: [item.load() for item in items("image", [cifar])]))
    try:
        from PIL import Image
    except ImportError:
        return kinds
    (folder / "images" / "a").mkdir(parents=True)
    image = folder / "images" / "a" / "p.png"
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(image)
    return [*kinds, Kind("PNG", image, lambda: [item.load() for item in items("image", [folder / "images"])])]


def _json_tokenizer(path: Path, texts: list[str]) -> list[Kind]:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        return []
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))

    def ids() -> Any:
        return load_tokenizer(str(path)).encode(["some text"])[0].tolist()

    return [Kind("tokenizer.json", path, ids), Kind("tokenizer.json, forged", path, ids, sign=lambda value: value)]


def _documents(path: Path) -> list[str]:
    source = TextSource((path,), on_bad_record="skip", on_bad_utf8="replace")
    return list(read_documents(source, [look_at(path, "text")], ReadCounts()))


def main() -> None:
    parser = tool_parser(__doc__ or "", "python -m tests.fuzz --inputs 50000")
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    def hangs(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {HANG_S} s")

    signal.signal(signal.SIGALRM, hangs)
    with tempfile.TemporaryDirectory() as name:
        kinds = all_kinds(Path(name))
        fuzz(kinds, arguments.inputs, arguments.seed)
    rows = [
        {"kind": kind.name, "inputs": kind.inputs, "refused": kind.refused, "faults": len(kind.faults),
         "longest_s": round(kind.longest_s, 3)} for kind in kinds
    ]  # fmt: skip
    print_table(f"mutated files, {sum(kind.inputs for kind in kinds):,} in all", rows, arguments.json)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"largest memory of the process: {memory:,.0f} MiB")
    for kind in kinds:
        for fault in sorted(set(kind.faults)):
            print(f"{kind.name}: {fault!r}, {kind.faults.count(fault)} times")
    if any(kind.faults for kind in kinds):
        raise UserError("there are faults, named above")


if __name__ == "__main__":
    run_tool(main)
