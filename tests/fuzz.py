"""Mutates files of every kind that others may give us, and reads them.

    python -m tests.fuzz --inputs 50000

A reader takes what it is given or refuses it in a message. Any other exception is a fault; so is more than `HANG_S`,
and, of a kind with a checksum, a file that says something else than before and is taken. "Forged" files have values of
wrong types and sizes under a checksum that fits.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from megassm.cli.arguments import print_table, run_tool, tool_parser
from megassm.config.source import ConfigError
from megassm.errors import UserError
from tests.fuzz_kinds import Kind, data_sets, models, run_files, texts
from tests.fuzz_machine import answers, caches, command_lines, tables

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
    b"$x_{",
    b"\xe2\x80\xae",
)


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
        kind.faults.append(f"{type(error).__name__}: {str(error)[:100]}{_place_of(error)}")
    finally:
        signal.alarm(0)
    kind.inputs += 1
    kind.longest_s = max(kind.longest_s, time.perf_counter() - began)


def _place_of(error: BaseException) -> str:
    """Where in the package it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/megassm/" in frame.filename]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def fuzz(kinds: list[Kind], inputs: int, seed: int) -> None:
    """Spreads `inputs` evenly over the kinds."""
    dice = random.Random(seed)
    for kind in kinds:
        whole = kind.path.read_bytes()
        expected = kind.read()
        for _ in range(-(-int(inputs * kind.share) // len(kinds))):
            try_one(kind, forged(whole, dice, kind.sign) if kind.sign else mutated(whole, dice), expected)
        kind.path.write_bytes(whole)


def all_kinds(folder: Path) -> list[Kind]:
    """A sound file of each kind, below `folder`."""
    makers = (data_sets, run_files, models, texts, tables, caches, answers, command_lines)
    return [kind for make in makers for kind in make(folder)]


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
