"""Small files and words that ask for more than any machine has, and those that end a careless reader in a traceback.

Each is refused in a message or harmless, within a second of CPU time and 200 MB. What it costs is measured in a process
of its own, which has imported everything before.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import pickle
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from megassm.commands import plan, prepare, slurm, sweep, train
from megassm.config.load import load_config
from megassm.data.prepare.tar import tar_members
from megassm.data.prepare.workers import worker_pool
from megassm.data.stores import open_store
from megassm.data.task import load_task
from megassm.data.tokenizer.base import train_sentencepiece
from megassm.data.transport import Meter, Patience, Transport
from megassm.report.run_files import read_knobs
from megassm.run.left_out import read_left_out
from tests import bombs
from tests.bombs import (
    DEEP,
    DIGITS,
    MANY,
    TINY,
    Bomb,
    arrays,
    checkpoint,
    documents,
    forged_index,
    labelled,
    nothing,
    npy,
    rows,
    tokenizer,
    views,
    with_id,
    write,
)
from tests.bounds import command as run_command
from tests.bounds import cost_of

MOST_BYTES = 200 * 10**6
MOST_S = 1.0


def job(content: str | bytes) -> Bomb:
    read = lambda folder: run_command(slurm.main, "cancel", str(folder))  # noqa: E731
    return Bomb(write("jobs/0001/job.json", content), read, r"job\.json: ")


def config(text: str | bytes, says: str = r"config\.yaml") -> Bomb:
    return Bomb(write("config.yaml", text), lambda folder: load_config(folder / "config.yaml"), says)


def override(*words: str, says: str = "") -> Bomb:
    read = lambda folder: run_command(train.main, "--config", TINY, *words, "--print-config")  # noqa: E731
    return Bomb(nothing, read, says or re.escape(words[0].partition("=")[0]))


def words(main: bombs.Make, *given: str, says: str) -> Bomb:
    return Bomb(nothing, lambda folder: run_command(main, *given), says)  # type: ignore[arg-type]


def model(says: str | None = r"config\.json", read: bombs.Read = bombs.model, **change: object) -> Bomb:
    return Bomb(lambda folder: bombs.exported(folder, **change), read, says)


def data_set(makes: bombs.Make, says: str) -> Bomb:
    return Bomb(makes, bombs.data_set, says)


def answer(raw: str, says: str, endless: bool = False) -> Bomb:
    """A server that sends this, whatever it is asked for."""

    def serve(server: socket.socket) -> None:
        while True:
            connection = server.accept()[0]
            with contextlib.suppress(OSError), connection:
                connection.recv(2**16)
                connection.sendall(raw.encode())
                while endless:
                    connection.sendall(bytes(2**20))

    def make(folder: Path) -> None:
        server = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        (folder / "port").write_text(str(server.getsockname()[1]), encoding="ascii")

    def read(folder: Path) -> None:
        store = open_store(f"http://127.0.0.1:{(folder / 'port').read_text(encoding='ascii')}/set")
        Transport(store, Patience(0.2, 0.01, 0.01), Meter()).fetch("a.tar", 0, 100)

    return Bomb(make, read, says)


def view(*lines: object) -> Bomb:
    return Bomb(rows(*lines), views, None)


ALIASES = "a: &a [1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BOMBS: dict[str, Bomb] = {
    # texts
    "a line of 3 GB": Bomb(
        write("x.jsonl.gz", gzip.compress(b'{"text": "') + MANY * 192),
        documents("x.jsonl.gz"),
        r"x\.jsonl\.gz:1: longer than the 64 MiB of one record",
    ),
    "a line of 3 GB, and a limit": Bomb(
        write("x.jsonl.gz", gzip.compress(b'{"text": "') + MANY * 192),
        documents("x.jsonl.gz", max_document_bytes=1000),
        "longer than the 64 MiB",
    ),
    "50,000 streams of nothing": Bomb(
        write("x.jsonl.bz2", bz2.compress(b"") * 50_000 + bz2.compress(b'{"text": "a"}\n')),
        documents("x.jsonl.bz2"),
        None,
    ),
    "a sparse member of 6 GB": Bomb(
        write("x.tar", bombs.SPARSE), lambda folder: list(tar_members(folder / "x.tar")), "not a sound tar file"
    ),
    "a sparse member of 6 GB, of text": Bomb(write("x.tar", bombs.SPARSE), documents("x.tar"), "not a sound tar file"),
    "a sparse member of 6 GB, packed": Bomb(
        write("x.tar.gz", gzip.compress(bombs.SPARSE)),
        documents("x.tar.gz"),
        r"x\.tar\.gz: .*(longer than the 64 MiB|not a sound tar)",
    ),
    "attributes of 3 GB, packed": Bomb(
        write("x.tar.gz", bombs.HUGE_ATTRIBUTES), documents("x.tar.gz"), r"x\.tar\.gz: "
    ),
    "a sample of 100 members": Bomb(
        write("x.tar.gz", gzip.compress(bombs.ONE_KEY + bytes(10240))), documents("x.tar.gz"), r"x\.tar\.gz: "
    ),
    "deep lines": Bomb(write("x.jsonl", DEEP), documents("x.jsonl"), "record 1: not JSON"),
    "a number of a line": Bomb(write("x.jsonl", f'{{"text": {DIGITS}}}\n'), documents("x.jsonl"), "not JSON"),
    "Parquet, texts that are alike": Bomb(bombs.texts_alike, documents("x.parquet"), None),
    "Parquet, one long text": Bomb(bombs.one_text, documents("x.parquet"), "more than 100 times its"),
    "Arrow, one long text": Bomb(bombs.one_text, documents("x.arrow"), "more than 100 times its"),
    # data sets
    "an index of zeros": data_set(forged_index(lambda index: None, bombs.zeros()), r"index\.npz: .*unpacks to"),
    "an index of junk": data_set(
        forged_index(lambda index: None, b"PK\3\4junk"), r"index\.npz: .*not a file of arrays"
    ),
    "a shard named 5": data_set(forged_index(lambda index: index["shards"][0].update(name=5)), r"index\.json: .*name"),
    "text bytes of x": data_set(forged_index(lambda index: index.update(text_bytes="x")), r"index\.json: .*text_bytes"),
    "an end of 1.5": data_set(forged_index(lambda index: index.update(eod=1.5)), r"index\.json: .*eod"),
    "a bad header under a fitting CRC": data_set(
        lambda folder: bombs.forged_blocks(folder, b"\xff" * 100), r"\.tar.*sound headers"
    ),
    "a block beyond its shard": data_set(
        lambda folder: bombs.forged_blocks(folder, offset=2**64 - 1), "blocks, shards and totals disagree"
    ),
    "a block of 2^63 bytes": data_set(
        lambda folder: bombs.forged_blocks(folder, size=2**63), "blocks, shards and totals disagree"
    ),
    "a deep index": data_set(write("set/index.json", DEEP), "nested more than 64 deep"),
    "deep links": Bomb(write("x.json", DEEP), lambda folder: open_store(str(folder / "x.json")), "64 deep"),
    "links to nowhere": Bomb(
        write("x.json", '{"index.json": "http://[::1/x"}'),
        lambda folder: open_store(str(folder / "x.json")),
        "not a list of links",
    ),
    "no URL": Bomb(nothing, lambda folder: open_store("http://[::1"), "not a URL"),
    "an index that is a device": data_set(
        lambda folder: ((folder / "set").mkdir(), (folder / "set/index.json").symlink_to("/dev/zero")),
        r"index\.json: is no regular file",
    ),
    "an answer without an end": answer(
        "HTTP/1.1 206 x\r\nContent-Range: bytes 0-99/*\r\n\r\n", "asked for bytes=0-99, more came", endless=True
    ),
    "a range of 5,000 digits": answer(
        f"HTTP/1.1 206 x\r\nContent-Range: bytes {DIGITS}-{DIGITS}/*\r\n\r\n", "HTTP 206 with"
    ),
    "a length that is no number": answer("HTTP/1.1 200 x\r\nContent-Length: \u00b2\r\n\r\nabc", "ignores Range"),
    "a redirect to no URL": answer("HTTP/1.1 302 x\r\nLocation: http://[::1/\r\n\r\n", "what is no URL"),
    "a redirect to a file": answer("HTTP/1.1 302 x\r\nLocation: file:///etc/passwd\r\n\r\n", "not a URL"),
    "headers without an end": answer("HTTP/1.1 206 x\r\n" + "A: b\r\n" * 10**5, "given up"),
    # runs
    "deep rows": view(DEEP, "[[[", {"step": 2, "valid": "x"}),
    "phases of 3e5": view({"step": 2, "phases_s": {str(n): 1.0 for n in range(300_000)}}),
    "rows of other types": view(
        {"step": "x"},
        {"step": 2, "loss": "low"},
        {"step": 2, "tokens": [1]},
        "{}",
        '{"step": 1e999}',
        f'{{"step": {DIGITS}}}',
        {"step": 2, "valid": {"a": 1}},
        {"step": 2, "step_s": True},
    ),
    "other phases in every row": Bomb(
        rows(*({"step": n, "step_s": 0.1, "phases_s": {f"{n} {m}": 0.1 for m in range(50)}} for n in range(2, 3000))),
        views,
        None,
    ),
    "a row that does not end": Bomb(write("metrics.jsonl", b'{"step": 1}\n' + b"x" * 2**25), views, None),
    "failures of nothing": Bomb(write("failures.jsonl", "{}\n"), views, None),
    "deep failures": Bomb(write("failures.jsonl", DEEP + "\n[]\n"), views, None),
    "events of other types": Bomb(
        write("events.jsonl", '{"kind": 1}\n{"kind": "stop", "time": 1e300}\n' + DEEP), views, None
    ),
    "a journal that is a pipe": Bomb(bombs.pipes, views, "is no regular file"),
    "a journal that is a device": Bomb(
        lambda folder: (folder / "metrics.jsonl").symlink_to("/dev/zero"), views, "is no regular file"
    ),
    "deep batches left out": Bomb(write("left_out.json", DEEP), read_left_out, r"left_out\.json"),
    "a job of nothing": job("{}"),
    "a job that is a list": job("[]"),
    "a job that is no UTF-8": job(b"\xff\xfe"),
    "a deep job": job(DEEP),
    # configurations
    "an alias bomb": config(ALIASES),
    "an alias bomb under report": Bomb(write("config.yaml", ALIASES), read_knobs, None),
    "deep YAML": config(DEEP),
    "deep YAML under report": Bomb(write("config.yaml", DEEP), read_knobs, None),
    "YAML that is no UTF-8": config(b"train: \xff\n"),
    "steps of -1": override("train.steps=-1"),
    "YAML of 5,000 digits": config(f"train: {{steps: {DIGITS}}}\n"),
    "!!bool 5": override("train.compile=!!bool 5"),
    "a folder that is !!bool 5": Bomb(nothing, lambda folder: load_config(Path(TINY), ["run.dir=!!bool 5"]), None),
    "a long hexadecimal": override("train.steps=-0x" + "F" * 5000),
    "brackets": override("train.steps=" + DEEP),
    "layers in hexadecimal": override("model.n_layers=0xffffffffffffffffffff"),
    "5,000 digits": override("train.steps=" + DIGITS),
    "a long name": override("x" * 100_000 + "=1", says="unknown|x{10}"),
    # checkpoints
    "a manifest of 1e999 bytes": Bomb(
        checkpoint(lambda facts: facts["files"].update(x=[float("inf"), 0])),
        bombs.weights_of_checkpoint,
        r"manifest\.json: ",
    ),
    "a deep manifest": Bomb(write("step-00000001/manifest.json", DEEP), bombs.weights_of_checkpoint, "64 deep"),
    "a checkpoint's header": Bomb(
        checkpoint(lambda facts: None, b"\xff" * 8 + b"{}" * 500), bombs.weights_of_checkpoint, "step-00000001"
    ),
    "a checkpoint of 10,000 layers": Bomb(
        checkpoint(lambda facts: facts["config"]["model"].update(n_layers=10_000)),
        bombs.weights_of_checkpoint,
        "says a model of",
    ),
    # models
    "1e9 layers": model(n_layers=10**9),
    "10,000 layers": model(n_layers=10**4),
    "1e10 rows of the embedding": model(vocab_size=10**10),
    "1e7 rows of the embedding": model(vocab_size=10**7),
    "a length of 1e9": model(seq_len=10**9),
    "a width of 2^24": model(d_model=2**24),
    "5,000 digits of a model": Bomb(
        write("config.json", f'{{"megassm": {{"model": {DIGITS}}}}}'), bombs.model, r"config\.json"
    ),
    "a deep config.json": Bomb(write("config.json", DEEP), bombs.model, r"config\.json"),
    "10,000 layers under transformers": model(read=bombs.of_transformers, n_layers=10**4),
    "1e7 rows under transformers": model(read=bombs.of_transformers, vocab_size=10**7),
    # tokenizers
    "an id of 2^32 - 1": Bomb(with_id(2**32 - 1), tokenizer("tokenizer.json"), r"tokenizer\.json: (has the id|not a)"),
    "an id of 2^32": Bomb(with_id(2**32), tokenizer("tokenizer.json"), r"tokenizer\.json: not a"),
    "an id of 1e999": Bomb(with_id(1e999), tokenizer("tokenizer.json"), r"tokenizer\.json: not a"),
    "a piece that is cut amid a character": Bomb(
        bombs.cut_amid_a_character, tokenizer("one/tokenizer.json"), "continuing_subword_prefix"
    ),
    "a prefix beside another": Bomb(
        bombs.cut_amid_a_character, tokenizer("two/tokenizer.json"), r"tokenizer\.json: not a"
    ),
    "a deep tokenizer": Bomb(write("tokenizer.json", DEEP), tokenizer("tokenizer.json"), r"tokenizer\.json"),
    "a piece that is no UTF-8": Bomb(
        write("x.model", bombs.pieces().replace(b"some", b"\xff\xfeme")), tokenizer("x.model"), r"x\.model: "
    ),
    "a deep task": Bomb(write("task.json", DEEP), lambda folder: load_task(folder / "task.json"), r"task\.json"),
    # labelled files
    "an image of 20,000 x 20,000": Bomb(
        write("i/a/x.png", bombs.png(20_000, 20_000)), labelled("image", "i"), r"x\.png: .*pixels"
    ),
    "PostScript": Bomb(
        write("i/a/x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"),
        labelled("image", "i"),
        "cannot identify image",
    ),
    "an array that a pickle asks for": Bomb(
        write("data_batch_1", pickle.dumps({b"labels": [0], b"data": bombs._Crafted()}, 2)),
        labelled("image", "data_batch_1"),
        "not a batch of CIFAR-10",
    ),
    "a key that cannot be hashed in time": Bomb(
        write("data_batch_1", bombs.tuples_of_tuples(b"K\1s.")),
        labelled("image", "data_batch_1"),
        "a key that is no text",
    ),
    "arrays of nothing": Bomb(
        arrays(npy("(100000000, 0, 4)"), npy("(100000000,)", "|V0")), labelled("image", "set"), r"images\.npy: (is|not)"
    ),
    "arrays of two colours": Bomb(
        arrays(npy("(2, 1, 1, 2)") + b"abcd", npy("(2,)") + b"ab"), labelled("image", "set"), r"images\.npy: is"
    ),
    "a label without an axis": Bomb(
        arrays(npy("(1, 1, 1)") + b"a", npy("()") + b"a"), labelled("image", "set"), r"images\.npy: is"
    ),
    "an array beyond its file": Bomb(
        arrays(npy("(9223372036854775807, 2, 2)"), npy("(2,)") + b"ab"),
        labelled("image", "set"),
        r"images\.npy: not an array",
    ),
    "deep labels": Bomb(write("x.jsonl", DEEP), labelled("text", "x.jsonl"), r"x\.jsonl:1: "),
    # tasks of the harness
    "a task's line of 3 GB": Bomb(
        write("hellaswag.jsonl.gz", gzip.compress(b'{"a": "') + MANY * 192), bombs.local_task, "16 MiB"
    ),
    "a task that is no gzip": Bomb(write("hellaswag.jsonl.gz", b"junk"), bombs.local_task, "damaged gzip"),
    "a deep task of the harness": Bomb(
        write("hellaswag.jsonl.gz", gzip.compress(DEEP.encode())), bombs.local_task, "64 deep"
    ),
    "brackets that do not close": Bomb(
        write("hellaswag.jsonl.gz", bombs.markup("[" * 300_000)), bombs.local_task, None
    ),
    "brackets that close at once": Bomb(
        write("hellaswag.jsonl.gz", bombs.markup("a[]" * 300_000)), bombs.local_task, None
    ),
    "an answer of infinity": Bomb(
        write("hellaswag.jsonl.gz", bombs.markup("a", answer=float("inf"))), bombs.local_task, "not an example of"
    ),
    # this machine's own
    "filters of zeros": Bomb(bombs.filters_of_zeros, bombs.filters, None),
    # words
    "1e20 nodes": words(plan.main, "--config", TINY, "--nodes", "1" + "0" * 20, says="--nodes"),
    "GPUs of 5,000 digits": words(plan.main, "--config", TINY, "--gpus-per-node", DIGITS, says="--gpus-per-node"),
    "words of a device": words(prepare.main, "@/dev/zero", says="is no regular file"),
    "words that are no UTF-8": Bomb(
        write("words", b"--input\n\xff\n"),
        lambda folder: run_command(prepare.main, f"@{folder / 'words'}"),
        "--output|UTF-8",
    ),
    "a vocabulary of 1e12": Bomb(nothing, lambda folder: train_sentencepiece(["a"], 10**12), "ids end below"),
    "a trillion processes": Bomb(nothing, lambda folder: worker_pool(10**12), "--workers"),
    "budgets to 999999999": words(sweep.main, "x", "--budgets", "1-999999999", says="a budget is at most"),
    "a path that is no UTF-8": words(sweep.main, "\udcc4n", says="no such|no complete checkpoint"),
}


def detonate(name: str, folder: Path) -> None:
    BOMBS[name].read(folder)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    bomb = BOMBS[name]
    bomb.make(tmp_path)
    cost = cost_of(detonate, name, tmp_path)
    assert not cost.fault
    assert cost.cpu_s < MOST_S
    assert cost.peak_bytes < MOST_BYTES
    if bomb.says is None:
        assert cost.refusal is None
    else:
        assert re.search(bomb.says, cost.refusal or "it was taken"), cost.refusal
        assert len(cost.refusal or "") < 6000


def busy(seconds: float) -> None:
    """Takes a processor so long, however quick it is."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_process_of_its_own_is_measured(tmp_path: Path) -> None:
    """The bounds above can fail."""
    assert cost_of(bytes, 300 * 10**6).peak_bytes < MOST_BYTES, "memory that is not touched"
    assert cost_of(b"x".__mul__, 300 * 10**6).peak_bytes > MOST_BYTES
    assert cost_of(busy, 1.1 * MOST_S).cpu_s > MOST_S
    assert "ZeroDivisionError" in cost_of(divmod, 1, 0).fault
    assert "code -6" in cost_of(__import__("os").abort).fault
