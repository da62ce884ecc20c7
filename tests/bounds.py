"""What reading something costs: CPU seconds and memory in a process of its own, in which the imports are done.

CPU time and not the clock, so that a busy machine changes nothing. The process is forked from one that has imported
everything and read nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

PRELOADED = [
    "megassm.checkpoint.open", "megassm.commands.generate", "megassm.commands.plan", "megassm.commands.prepare",
    "megassm.commands.slurm", "megassm.commands.sweep", "megassm.commands.train", "megassm.commands.watch",
    "megassm.eval.session", "megassm.report.html", "megassm.report.live", "megassm.data.tasks.from_files",
    "ruamel.yaml", "rich.console", "rich.table", "sentencepiece", "webdataset.tariterators", "pyarrow.parquet",
    "pyarrow.ipc", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "PIL.BmpImagePlugin", "tokenizers", "urllib3", "psutil",
    "tests.test_bombs", "megassm.hf.heads",
    "megassm.eval.tasks.local",
]  # fmt: skip
PATIENCE_S = 120


class Cost(NamedTuple):
    """Of one call."""

    refusal: str | None
    """The message of a `UserError` or of a command that ended with code 1 or 2; None where it went well."""
    fault: str
    """The traceback of anything else."""
    cpu_s: float
    peak_bytes: int
    """Beyond what the process had before."""


def cost_of(call: Callable[..., Any], *arguments: Any) -> Cost:
    """Runs `call`, which the process must be able to import, with `arguments`."""
    nursery = _nursery()
    nursery.send((call, arguments))
    found: Cost = nursery.recv()
    return found


@lru_cache
def _nursery() -> Connection:
    """To the process that is forked; multiprocessing's server of forks is whoever's asked first, with their imports."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_fork_for_each, args=(there,), daemon=True).start()
    there.close()
    return here


def _fork_for_each(asked: Connection) -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    while True:
        call, arguments = asked.recv()
        here, there = multiprocessing.Pipe(duplex=False)
        child = os.fork()
        if not child:
            _run(there, call, arguments)
        there.close()
        asked.send(_told(here, child))


def _told(here: Connection, child: int) -> Cost:
    found, fault = None, f"did not end within {PATIENCE_S} s"
    try:
        if here.poll(PATIENCE_S):
            found = here.recv()
    except EOFError:
        fault = ""
    os.kill(child, signal.SIGKILL)  # what has ended by itself keeps its code
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    here.close()
    return found or Cost(None, fault or f"the process ended with code {code}", 0.0, 0)


def command(main: Callable[[], None], *words: str) -> None:
    """A command of megassm as a user starts it; ends as it does."""
    from megassm.cli.arguments import run_tool

    sys.argv = ["megassm", *words]
    run_tool(main)


def _run(told: Connection, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from megassm.cli.arguments import error_text
    from megassm.config.source import ConfigError
    from megassm.errors import UserError

    torch.set_num_threads(1)
    refusal, fault, said = None, "", io.StringIO()
    before, began = _memory(reset=True), time.process_time()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            call(*arguments)
    except (UserError, OSError) as error:  # as `run_tool` has it
        refusal = error_text(error)
    except ConfigError as error:  # and `load_config_or_exit`
        refusal = str(error)
    except SystemExit as stop:
        refusal = said.getvalue() if stop.code in (1, 2) else None
        fault = "" if stop.code in (0, 1, 2, None) else f"ended with code {stop.code}"
    except BaseException:
        fault = traceback.format_exc()
    cpu_s, peak = time.process_time() - began, _memory(reset=False)
    told.send(Cost(refusal, fault or ("Traceback" in said.getvalue()) * said.getvalue(), cpu_s, peak - before))
    told.close()
    os._exit(0)


def _memory(reset: bool) -> int:
    """The largest memory so far, in bytes; counted from now on with `reset`, where the kernel lets us."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        assert found is not None
        return int(found[1]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
