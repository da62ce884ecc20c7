"""A sound file of every kind that others may give us, and how it is read: what `tests.fuzz` mutates."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from megassm.checkpoint.exported import CONFIG, SUMS, WEIGHTS, open_model_folder, write_model_folder
from megassm.checkpoint.format import FORMAT, MANIFEST, Manifest, _crc32, checksum_of, read_checkpoint
from megassm.config.load import load_config
from megassm.config.model import ModelConfig
from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import index_checksum, load_index, read_index
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.kinds import look_at
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.tar import tar_members
from megassm.data.stores import open_store
from megassm.data.task import load_task
from megassm.data.tasks.from_files import items
from megassm.data.tokenizer.base import BytesTokenizer, load_tokenizer, train_sentencepiece
from megassm.guarded import read_json
from megassm.model import build_model
from megassm.report.live import LiveRun
from megassm.report.run_files import read_knobs
from megassm.report.sweep_files import plot_steps
from megassm.report.terminal import frame
from megassm.run.events import read_events
from megassm.run.failures import check_failures
from megassm.run.fence import facts_of
from megassm.run.left_out import read_left_out
from megassm.run.lives import life_of
from megassm.run.records import newest_record, read_records
from megassm.slurm.request import Submitted, asked_before
from tests.conftest import ROOT
from tests.shard_sets import random_documents, write_documents

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
    recovers: bool = False
    """Of one with a checksum: what is damaged is not refused, it is made or fetched again."""
    share: float = 1.0
    """Of as many inputs as other kinds have; less where a read takes long."""
    inputs: int = 0
    refused: int = 0
    longest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def data_sets(folder: Path) -> list[Kind]:
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

    links = json.dumps({"index.json": "https://host/index.json?sig=1", "index.npz": "http://host:80/index.npz"})
    foreign = folder / "theirs.tar"
    foreign.write_bytes(shard.read_bytes())
    return [
        Kind("index.json", own / "index.json", facts, checked=True),
        Kind("index.json, forged", own / "index.json", facts, sign=signed),
        Kind("index.npz", own / "index.npz", facts, checked=True),
        Kind("shard", shard, ids, checked=True),
        Kind("another's tar", foreign, lambda: list(tar_members(foreign))),
        Kind("links", written(folder / "links.json", links), lambda: open_store(str(folder / "links.json"))),
    ]


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def run_files(folder: Path) -> list[Kind]:
    run = folder / "run"
    run.mkdir()
    events = [
        {"time": 1.0, "step": n, "kind": kind, "text": "x", "figures": {}} for n, kind in enumerate(("start", "stop"))
    ]
    job = {"job_id": "12", "request": {"nodes": "2", "gpus_per_node": 8, "tasks_per_node": 8, "time": "24:00:00",
                                       "save_before_s": 180, "sbatch": ["partition=gpu"]}}  # fmt: skip
    figures = {"k": 8, "loss": 1.5, "bits_per_byte": 2.0, "standard_error": 0.1}
    swept = {"step": 1, "trained_seq_len": 8, "curves": [{"seq_len": 8, "data": "x", "rows": [figures]}]}
    contents = {
        "metrics.jsonl": "".join(json.dumps(FIGURES | {"step": step}) + "\n" for step in range(1, 20)),
        "events.jsonl": "".join(json.dumps(event) + "\n" for event in events),
        "failures.jsonl": '{"failed": 3, "reason": "x", "killed": true}\n{"began": 1.0}\n',
        "left_out.json": '[{"step": 400, "batches": 37}]',
        "config.yaml": (ROOT / "configs/tiny.yaml").read_text(encoding="utf-8"),
        "job.json": json.dumps(job),
        "environment.json": '{"device": "cpu", "peak_tflops": 0.1, "host": "x"}\n',
        "failure.txt": "rank 3 no longer answers\nmore\n",
        "incarnations/0001": '{"host": "n1", "pid": 7, "job_id": "12"}\n',
        "step-00000001.json": json.dumps(swept),
    }
    (run / "incarnations").mkdir()
    for name, text in contents.items():
        (run / name).write_text(text, encoding="utf-8")

    def journal() -> None:
        read_records(run)
        newest_record(run / "metrics.jsonl")
        view()

    def view() -> None:
        Console(file=io.StringIO(), width=100).print(frame(LiveRun(run).look(), 100, 40))

    def asked() -> None:
        asked_before(read_json(run / "job.json", Submitted, limit=2**20).request, run / "job.json")

    return [
        Kind("metrics.jsonl", run / "metrics.jsonl", journal),
        Kind("events.jsonl", run / "events.jsonl", lambda: (list(read_events(run)), life_of(run))),
        Kind("failures.jsonl", run / "failures.jsonl", lambda: check_failures(run, run / "none", run / "none", None)),
        Kind("environment.json", run / "environment.json", view),
        Kind("failure.txt", run / "failure.txt", lambda: (view(), life_of(run))),
        Kind("a start's facts", run / "incarnations/0001", lambda: facts_of(run, 1)),
        Kind("a sweep's figures", run / "step-00000001.json", lambda: plot_steps(run), share=0.05),
        Kind("left_out.json", run / "left_out.json", lambda: read_left_out(run)),
        Kind("config.yaml", run / "config.yaml", lambda: (read_knobs(run), load_config(run / "config.yaml"))),
        Kind("job.json", run / "job.json", asked),
        Kind("job.json, forged", run / "job.json", asked, sign=lambda value: value),
    ]


def models(folder: Path) -> list[Kind]:
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

    plain = folder / "plain"
    shutil.copytree(exported, plain)
    (plain / SUMS).unlink()

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
        Kind("SHA256SUMS", exported / SUMS, model),
        Kind("exported config.json, forged", plain / CONFIG, lambda: list(open_model_folder(plain).weights()),
             sign=lambda value: value),
    ]  # fmt: skip


def texts(folder: Path) -> list[Kind]:
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
        Kind("documents, gzip", packed, lambda: documents(packed)),
    ]
    kinds += _json_tokenizer(folder / "tokenizer.json", library)
    rows = np.zeros((2, 3072), dtype=np.uint8)
    cifar.write_bytes(pickle.dumps({b"labels": [0, 1], b"data": rows}, protocol=2))
    kinds.append(Kind("CIFAR-10 batch", cifar, _loads("image", cifar)))
    arrays = folder / "arrays"
    arrays.mkdir()
    np.save(arrays / "images.npy", np.arange(96, dtype=np.uint8).reshape(2, 4, 4, 3))
    np.save(arrays / "labels.npy", np.array([0, 1]))
    kinds += [Kind(name, arrays / name, _loads("image", arrays)) for name in ("images.npy", "labels.npy")]
    try:
        from PIL import Image
    except ImportError:
        return kinds
    for suffix in ("png", "jpg", "bmp"):
        image = folder / suffix / "a" / f"p.{suffix}"
        image.parent.mkdir(parents=True)
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(image)
        kinds.append(Kind(suffix.upper(), image, _loads("image", image.parents[1])))
    return kinds


def _loads(kind: Any, place: Path) -> Callable[[], list[bytes]]:
    return lambda: [item.load() for item in items(kind, [place])]


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


def documents(path: Path) -> list[str]:
    source = TextSource((path,), on_bad_record="skip", on_bad_utf8="replace")
    return list(read_documents(source, [look_at(path, "text")], ReadCounts()))
