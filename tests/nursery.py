"""Starts the project's programs in forks of one process that has the imports: in milliseconds each, not in seconds.

A fork has the words, the environment, the folder, the output and the end of a program of its own. What depends on when
something is imported is started for real.

    python -m tests.nursery     a request a line on its input, the exit code of each on its output
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import threading
import traceback
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PRELOADED = ("deepspeed", "numpy", "ruamel.yaml", "rich.progress", "sentencepiece", "torch", "webdataset",
             "megassm.eval.session", "megassm.parallel.engine", "megassm.train.loop")  # fmt: skip


def serves(arguments: tuple[str, ...]) -> bool:
    """Whether these are the words of a program of the project's."""
    return arguments[0].endswith(".py") or arguments[:2] == ("-m", "megassm")


def run(arguments: tuple[str, ...], out: Path, err: Path, timeout_s: float, folder: Path = ROOT) -> int:
    """The exit code of a program that is run in a folder and whose output goes to two files."""
    nursery = _nursery()
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    files = {"out": str(out), "err": str(err), "folder": str(folder)}
    request = {"arguments": arguments, **files, "environment": dict(os.environ)}
    timer = threading.Timer(timeout_s, nursery.kill)
    timer.start()
    try:
        nursery.stdin.write(json.dumps(request) + "\n")
        nursery.stdin.flush()
        answer = nursery.stdout.readline()
    finally:
        timer.cancel()
    if not answer:
        _nursery.cache_clear()
        raise TimeoutError(f"{arguments} did not end within {timeout_s} s, or ended what had started it")
    return int(answer)


@lru_cache
def _nursery() -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.nursery"]
    nursery = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(nursery.communicate)  # it ends with its input
    return nursery


def main() -> None:
    import megassm.commands

    commands = [f"megassm.commands.{module.name}" for module in pkgutil.iter_modules(megassm.commands.__path__)]
    with contextlib.redirect_stdout(sys.stderr):
        for name in (*PRELOADED, *commands):
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(arguments: list[str], out: str, err: str, folder: str, environment: dict[str, str]) -> None:
    """Is the program, and ends."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, (path, mode) in enumerate(((os.devnull, os.O_RDONLY), (out, os.O_WRONLY), (err, os.O_WRONLY))):
        opened = os.open(path, mode)
        os.dup2(opened, number)
        os.close(opened)
    code = 1
    try:
        code = _ran(arguments)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _ran(arguments: list[str]) -> int:
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, str(ROOT / Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
