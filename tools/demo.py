"""The whole path on real text, on a plain machine: tokenizer, shards, training, budget sweep, samples.

Without `--text`, the text is the source code of Python's own standard library: real, large enough, and on every
machine that can run this. Each step is an ordinary command, printed before it runs; copy what you need.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from megassm.cli.arguments import Parser, run_tool
from megassm.errors import UserError

NOT_TEXT = {"site-packages", "dist-packages", "test", "lib-dynload", "__pycache__", "encodings", "lib2to3", "idlelib"}
"""Entries of the standard library's folder that are not its own prose-like source code."""


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/demo.py --text my_notes/ --glob '*.md'")
    result.add_argument("--text", type=Path, nargs="+", metavar="PATH", help="train on these files or folders instead")
    result.add_argument("--glob", metavar="PATTERN", help="files to take from folders")
    result.add_argument("--run", default="runs/demo", metavar="DIR", help="run directory (default: %(default)s)")
    result.add_argument("--data", default="data/demo", metavar="DIR", help="data set (default: %(default)s)")
    result.add_argument("--ranks", type=int, default=2, help="processes to train on (default: %(default)s)")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="passed to the training run")
    return result


def standard_library() -> list[str]:
    """The files and packages of Python's standard library, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    entries = [path for path in sorted(folder.iterdir()) if path.name not in NOT_TEXT]
    return [str(path) for path in entries if path.suffix == ".py" or (path / "__init__.py").exists()]


def step(title: str, program: str, *arguments: str, shown: str | None = None) -> None:
    """Prints a command and runs it; a failure ends the demo with its exit code."""
    command = [program, *arguments]
    print(f"\n== {title}\n$ {shown or shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"this step ended with exit code {code}; what it printed above says why")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def main() -> None:
    arguments = parser().parse_intermixed_args()
    started = time.monotonic()
    python, launcher = sys.executable, str(Path(sys.executable).with_name("deepspeed"))
    inputs = [str(path) for path in arguments.text] if arguments.text else standard_library()
    source = ["--input", *inputs, "--on-bad-utf8", "skip"]
    pattern = arguments.glob or (None if arguments.text else "*.py")
    if pattern:
        source += ["--glob", pattern]
    shown = f"--input {'TEXT' if arguments.text else 'PYTHON_STANDARD_LIBRARY'} ..."
    tokenizer, data, run = f"{arguments.data}.model", arguments.data, arguments.run

    options = ["--vocab-size", "2048", "--max-bytes", "4000000", "--output", tokenizer]
    step("train a tokenizer", python, "tools/train_tokenizer.py", *source, *options,
         shown=shlex.join(["python", "tools/train_tokenizer.py"]) + f" {shown} {shlex.join(options)}")  # fmt: skip
    options = ["--tokenizer", tokenizer, "--output", data, "--block-tokens", "65536"]
    step("write shards", python, "tools/prepare_data.py", *source, *options,
         shown=shlex.join(["python", "tools/prepare_data.py"]) + f" {shown} {shlex.join(options)}")  # fmt: skip
    step("train on all budgets at once", launcher, "--num_gpus", str(arguments.ranks), "launch/pretrain.py",
         "--config", "configs/tiny.yaml", f"run.dir={run}", f"data.path={data}", *arguments.overrides)  # fmt: skip
    step("measure every budget", python, "tools/sweep_budgets.py", run, "--budgets", "1,2,3,4,6,8,16,32")
    step("sample at two budgets", python, "tools/generate.py", run, "--budgets", "4,32",
         "--prompt", "def __init__(self, ", "--json", f"{run}/samples.json")  # fmt: skip

    print(f"\ndone in {time.monotonic() - started:.0f} s. Look at:")
    for name, what in (
        ("sweep.png", "quality and speed against the budget K"),
        ("sweep.html", "the same with every figure, in a browser"),
        ("sweep.json", "the table above (sweep.csv too)"),
        ("metrics.jsonl", "one line an update: loss, bits per byte, K, learning rate, speed, utilisation"),
        ("config.yaml", "the resolved configuration; usable as --config"),
        ("checkpoints", "to continue, to sweep, to sample from"),
        ("samples.json", "what the model wrote at K=4 and K=32"),
    ):
        print(f"  {run}/{name:<15} {what}")


if __name__ == "__main__":
    run_tool(main)
