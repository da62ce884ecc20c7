"""The whole path on real text, on a plain machine: tokenizer, shards, training, budget sweep, baselines, samples.

Without `--text`, the text is the source code of Python's own standard library: real, large enough, and on every
machine that can run this. Each step is an ordinary command, printed as it runs; copy what you need. Data and run are
named by what they are made of, so another text never meets the files of this one, and the same command again goes on
where it was.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megassm.cli.arguments import Parser, run_tool
from megassm.errors import UserError

CONFIG = "configs/demo.yaml"
NOT_TEXT = {"site-packages", "dist-packages", "test", "lib-dynload", "__pycache__", "encodings", "lib2to3", "idlelib"}
"""Entries of the standard library's folder that are not its own prose-like source code."""
VOCABULARY = 2048
ENOUGH_FOR_A_VOCABULARY = 400_000
"""Bytes of text; a smaller one is read byte by byte, for its words are too few to count."""
BUDGETS = "1,2,3,4,6,8,12,16"
SCORED_SEQUENCES = 256
PROMPT_CHARS = 60
LEAST_STEPS = 100


@dataclass(frozen=True)
class Text:
    """What to train on, as the tools' options."""

    options: list[str]
    name: str
    """Of its data: a word, and a hash of all that decides what the data holds."""
    size: int
    """Bytes."""


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/demo.py --text 'my notes/' --glob '*.md'")
    result.add_argument("--text", type=Path, nargs="+", metavar="PATH", help="train on these files or folders instead")
    result.add_argument("--glob", metavar="PATTERN", help="files to take from folders")
    result.add_argument("--run", metavar="DIR", help="run directory (default: runs/demo-NAME-HASH)")
    result.add_argument("--data", metavar="DIR", help="data set (default: data/demo-NAME-HASH)")
    result.add_argument("--ranks", type=int, default=2, help="processes to train on (default: %(default)s)")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed to the training run")
    return result


def standard_library() -> list[Path]:
    """The files and packages of Python's standard library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    entries = [path for path in sorted(folder.iterdir()) if path.name not in NOT_TEXT]
    return [path for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()]


def find_text(inputs: Sequence[Path] | None, glob: str | None) -> Text:
    """The text that was asked for, known by what tools/prepare_data.py knows it by: each file's path, size and time.

    Raises:
        UserError: there is none.
    """
    from megassm.data.prepare.inputs import find_inputs
    from megassm.data.prepare.source import TextSource

    chosen = tuple(inputs or standard_library())
    glob = glob or (None if inputs else "*.py")
    files = find_inputs(TextSource(chosen, glob)).files
    known_by = "".join(f"{file.path} {file.size} {file.path.stat().st_mtime_ns}\n" for file in files)
    digest = hashlib.sha256(known_by.encode())
    word = re.sub(r"[^a-z0-9]+", "-", chosen[0].absolute().name.lower()).strip("-")[:20] if inputs else "python"
    name = f"demo-{word or 'text'}-{digest.hexdigest()[:8]}"
    if not inputs:  # too many for a command line that people read
        listed = Path("data") / f"{name}.inputs"
        listed.parent.mkdir(exist_ok=True)
        listed.write_text("".join(f"{path}\n" for path in chosen), encoding="utf-8")
        named = [f"@{listed}"]
    else:
        named = [str(path) for path in chosen]
    options = ["--input", *named, *(["--glob", glob] if glob else []), "--on-bad-utf8", "skip"]
    return Text(options, name, sum(file.size for file in files))


def step(title: str, program: str, *arguments: str) -> None:
    """Prints a command and runs it; a failure ends the demo with its exit code."""
    command = [_as_typed(program), *arguments]
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"this step ended with exit code {code}; what it printed above says why")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def free_port() -> int:
    """Another job on this machine may have the launcher's own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _as_typed(program: str) -> str:
    """Relative to this folder where it lies below it."""
    relative = os.path.relpath(program)
    return program if relative.startswith("..") else relative


def main() -> None:
    arguments = parser().parse_intermixed_args()
    started = time.monotonic()
    if not Path(CONFIG).exists():
        raise UserError(f"{CONFIG}: not here; run this from the folder that holds it, the project's root")
    text = find_text(arguments.text, arguments.glob)
    settings = " ".join([Path(CONFIG).read_text(encoding="utf-8"), text.name, *arguments.overrides])
    data = arguments.data or f"data/{text.name}"
    run = arguments.run or f"runs/{text.name}-{hashlib.sha256(settings.encode()).hexdigest()[:4]}"
    print(f"{text.size / 1e6:,.1f} MB of text; data in {data}, run in {run}; five to six minutes on two cores")
    prepare(text, data)
    python = sys.executable
    overrides = fitting_steps(Path(data), arguments.overrides)
    # the module, not bin/deepspeed: a script's first line cannot name an interpreter below a folder with a space
    step("train on all budgets at once", python, "-m", "deepspeed.launcher.runner",
         "--num_gpus", str(arguments.ranks), "--master_port", str(free_port()), "launch/pretrain.py",
         "--config", CONFIG, f"run.dir={run}", f"data.path={data}", *overrides)  # fmt: skip
    step("measure every budget", python, "tools/sweep_budgets.py", run, "--budgets", BUDGETS,
         "--sequences", str(SCORED_SEQUENCES))  # fmt: skip
    step("sample at two budgets, after a beginning from the validation text", python, "tools/generate.py", run,
         "--budgets", "4,16", "--prompt", prompt(Path(data)), "--json", f"{run}/samples.json")  # fmt: skip
    step("what needs no network, on the same text", python, "tools/baselines.py", run)
    say_where_to_look(run, time.monotonic() - started)


def prepare(text: Text, data: str) -> None:
    """Makes the tokenizer and the data set, or finds them done."""
    python, tokenizer = sys.executable, "bytes"
    if text.size >= ENOUGH_FOR_A_VOCABULARY:
        tokenizer = f"{data}.model"
        if Path(tokenizer).exists():
            print(f"\n{tokenizer} is there already")
        else:
            step("train a tokenizer", python, "tools/train_tokenizer.py", *text.options,
                 "--vocab-size", str(VOCABULARY), "--max-bytes", "4000000", "--output", tokenizer)  # fmt: skip
    step("write shards", python, "tools/prepare_data.py", *text.options, "--tokenizer", tokenizer, "--output", data,
         "--block-tokens", "65536")  # fmt: skip


def fitting_steps(data: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides, with fewer updates for a text that would be read too often; what they say themselves wins."""
    from megassm.config.load import load_config
    from megassm.data.index import load_index

    config = load_config(Path(CONFIG), (f"data.path={data}", *overrides), world_size=1)
    tokens = load_index(data / "train").tokens
    enough = max(LEAST_STEPS, round(config.data.max_epochs * tokens / config.tokens_per_step()))
    if enough >= config.train.steps or any(override.startswith("train.steps=") for override in overrides):
        return list(overrides)
    print(f"\na short text, {tokens:,} tokens: {enough:,} updates in place of {config.train.steps:,}")
    return [f"train.steps={enough}", *overrides]


def prompt(data: Path) -> str:
    """The beginning of a line of the validation text."""
    from megassm.data.index import load_index
    from megassm.data.prepare.verify import sample_texts
    from megassm.data.tokenizer.base import MODEL_NAME, load_tokenizer

    own = data / MODEL_NAME
    tokenizer = load_tokenizer(str(own) if own.exists() else "bytes")
    for sample in sample_texts(load_index(data / "valid"), tokenizer, 8):
        for line in sample.text.splitlines()[1:] + sample.text.splitlines()[:1]:
            words = line.rstrip()[: PROMPT_CHARS // 2 if len(line) < PROMPT_CHARS else PROMPT_CHARS]
            if len(words.split()) > 1 and words.isprintable():
                return words
    return "The "


def say_where_to_look(run: str, seconds: float) -> None:
    """Ends with the files that are worth a look."""
    print(f"\ndone in {seconds:.0f} s. Look at:")
    for name, what in (
        ("baselines.png", "the model at every budget, beside trigram, gzip and xz"),
        ("sweep.html", "quality and speed against the budget K, with every figure, in a browser"),
        ("sweep.png", "its curves"),
        ("sweep.json", "the table above (sweep.csv too)"),
        ("metrics.jsonl", "one line an update: loss, bits per byte, K, learning rate, speed, utilisation"),
        ("config.yaml", "the resolved configuration; usable as --config"),
        ("checkpoints", "to continue, to sweep, to sample from"),
        ("samples.json", "what the model wrote at K=4 and K=16"),
    ):
        print(f"  {run}/{name:<15} {what}")


if __name__ == "__main__":
    run_tool(main)
