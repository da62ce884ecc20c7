"""Runs the sections of `tools.bench.gpu` one by one: each in a process of its own, its failure or hang its own.

torch and DeepSpeed are imported once, and the sections forked from there before any device is touched; where a fork
has no device all the same, they are started anew. What compares values runs several at a time; what is timed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tools.bench.gpu.plan import Plan, Section, sections

RESULTS, LOG = "results.jsonl", "log.txt"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("first_hour"), metavar="DIR", help="where results go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument(
        "--only",
        metavar="LIST",
        help="groups (checks, training, timed), or sections whose names begin with one of these",
    )
    parser.add_argument("--jobs", type=int, default=6, metavar="N", help="sections at a time of those not timed")
    parser.add_argument("--limit-s", type=float, metavar="S", help="end everything after so many seconds")
    parser.add_argument("--budget-s", type=float, metavar="S", help="start no section after so many seconds")
    return parser.parse_args()


def work(section: Section, plan: Plan, folder: Path) -> None:
    """In the section's own process: its output to a file, its result or its error to another."""
    started = time.perf_counter()
    log = os.open(folder / f"{section.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    found: dict[str, Any] = {}
    try:
        if not section.timed:
            import torch

            torch.set_num_threads(plan.threads)
        for part in section.run(plan, folder / section.name):
            found |= part
            _write(folder, section, found | {"ok": False, "error": "ended early"}, started)
        _write(folder, section, {"ok": True} | found, started)
    except BaseException as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}"[:600]
        _write(folder, section, found | {"ok": False, "error": text}, started)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # neither a library's thread nor its own end may hold the next section up


def _write(folder: Path, section: Section, found: dict[str, Any], started: float) -> None:
    row = {"section": section.name, "seconds": round(time.perf_counter() - started, 2)} | found
    (folder / f"{section.name}.json").write_text(json.dumps(row, default=str), encoding="utf-8")


def touch(device: str) -> None:
    import torch

    os._exit(int(torch.ones(1, device=device).item() != 1))


def fork_has_device(device: str) -> bool:
    """Whether a fork of this process can use the device: not if an import has begun to."""
    child = multiprocessing.get_context("fork").Process(target=touch, args=(device,))
    child.start()
    child.join(60)
    return child.exitcode == 0


class Runner:
    """Starts sections, waits for them, and gathers what they leave."""

    def __init__(self, plan: Plan, folder: Path, out: Path, until: float = math.inf) -> None:
        self.plan, self.folder, self.out = plan, folder, out
        self.until = until
        """On the monotonic clock: what still runs then is ended."""
        self.context: ForkContext | SpawnContext = (
            multiprocessing.get_context("fork")
            if fork_has_device(plan.device)
            else multiprocessing.get_context("spawn")
        )
        self.running: dict[str, tuple[BaseProcess, Section, float]] = {}
        self.failed = 0

    def start(self, section: Section) -> None:
        child = self.context.Process(target=work, args=(section, self.plan, self.folder))
        child.start()
        self.running[section.name] = child, section, time.monotonic()

    def wait(self, fewer_than: int) -> None:
        while len(self.running) >= max(1, fewer_than):
            for name, (child, section, started) in list(self.running.items()):
                now = time.monotonic()
                late = now - started if now > min(started + section.limit_s, self.until) else None
                if late is not None and child.is_alive():
                    child.kill()
                if not child.is_alive() or late is not None:
                    child.join()
                    del self.running[name]
                    self.gather(section, child.exitcode, late)
            time.sleep(0.02)

    def gather(self, section: Section, code: int | None, late: float | None) -> None:
        """Of a section that ended with `code`, or was ended after `late` seconds."""
        path = self.folder / f"{section.name}.json"
        row = json.loads(path.read_text()) if path.exists() else {"section": section.name, "ok": False}
        if late is not None or code:
            row["ok"] = False
            row["error"] = f"exit code {code}" if late is None else f"killed after {late:.0f} s"
        self.failed += not row["ok"]
        print(json.dumps(row, default=str))
        with (self.out / RESULTS).open("a", encoding="utf-8") as results:
            results.write(json.dumps(row, default=str) + "\n")
        log = self.folder / f"{section.name}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        with (self.out / LOG).open("a", encoding="utf-8") as logs:
            logs.write(f"===== {section.name}: {'ok' if row['ok'] else 'FAILED'}\n{text}\n")


def main() -> None:
    arguments = parse()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in (RESULTS, LOG):
        (out / name).unlink(missing_ok=True)
    begun = time.monotonic()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU begins nothing
    os.environ.setdefault("DS_ACCELERATOR", arguments.device)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import deepspeed  # noqa: F401, TID251 - before the forks, once
    import torch

    import megassm.train.loop  # noqa: F401

    wanted = arguments.only.split(",") if arguments.only else [""]
    chosen = [s for s in sections(arguments.quick) if s.group in wanted or s.name.startswith(tuple(wanted))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        limit = arguments.limit_s or math.inf
        last_start = min(arguments.budget_s or math.inf, limit)
        threads = max(1, torch.get_num_threads() // arguments.jobs)  # more would wait for each other
        plan = Plan(arguments.device, arguments.quick, folder, out.resolve(), threads)
        runner = Runner(plan, folder, out, begun + limit)
        print(f"imports: {time.monotonic() - begun:.1f} s; sections are started by {runner.context.get_start_method()}")
        order = 0
        for section in sorted(chosen, key=lambda s: s.order):
            runner.wait(1 if section.timed or section.order > order else arguments.jobs)
            if time.monotonic() - begun > last_start:
                print(json.dumps({"section": section.name, "ok": None, "left_out": f"after {last_start:g} s"}))
                continue
            order = section.order
            runner.start(section)
        runner.wait(1)
    print(f"{len(chosen)} sections, {runner.failed} failed, {time.monotonic() - begun:.0f} s; {out / RESULTS}")
    raise SystemExit(1 if runner.failed else 0)


if __name__ == "__main__":
    main()
