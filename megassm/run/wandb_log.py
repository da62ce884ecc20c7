"""wandb gets every record from a thread of its own: training never waits for it.

Offline needs no account. Online without a key, or without a server, falls back to offline with one warning; whatever
else goes wrong ends its part with one warning. metrics.jsonl is the truth.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megassm.config.schema import Config
from megassm.run.directory import METRICS
from megassm.run.records import Record

INIT_TIMEOUT_S = 30
"""A server that does not answer is given up after this, and 10 s that wandb adds."""
FINISH_TIMEOUT_S = 60
"""Uploads may take so long when training is done."""
PRIVATE: dict[str, Any] = {
    "x_disable_meta": True,  # sys.argv, in which data.path may hold a password; host, user, program
    "x_disable_machine_info": True,
    "x_save_requirements": False,  # a package's origin may hold a token
    "disable_git": True,  # its patch of uncommitted files
    "disable_code": True,
    "save_code": False,
    "disable_job_creation": True,
}
"""wandb is told what this module tells it, and records nothing of the process by itself."""
WAITING_RECORDS = 10_000
"""Records that wait for wandb at most."""


class Tracker:
    """A run in wandb."""

    def __init__(self, config: Config, done_steps: int, warn: Callable[[str], None]) -> None:
        self._config = config
        self._done_steps = done_steps
        self._warn = warn
        self._records: queue.Queue[Record | None] = queue.Queue(WAITING_RECORDS)
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Hands over a record; never waits."""
        if self._given_up:
            return
        try:
            self._records.put_nowait(record)
        except queue.Full:
            self._give_up(f"it is {WAITING_RECORDS:,} records behind")

    def close(self) -> None:
        """Waits for what is still to be sent, not longer than wandb's own limits."""
        with contextlib.suppress(queue.Full):
            self._records.put(None, timeout=FINISH_TIMEOUT_S)
        self._thread.join(INIT_TIMEOUT_S + 10 + FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            self._give_up("it does not come to an end")

    def _work(self) -> None:
        try:
            run = self._start()
            while not self._given_up and (record := self._records.get()) is not None:
                run.log(_flat(record) | _curve_over_budgets(record), step=record["step"])
            run.finish()
        except Exception as error:
            self._give_up(_first_line(error))
            with contextlib.suppress(Exception):
                import wandb

                wandb.teardown()  # it would try again, loudly, when Python exits

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._warn(f"wandb is given up ({reason}); {METRICS} has everything")

    def _start(self) -> Any:
        """A wandb run. It never asks."""
        config, mode = self._config, self._config.log.wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        logging.raiseExceptions = False  # its log files print a page a line where the disk is full
        import wandb

        if mode == "online" and not wandb.api.api_key:
            self._warn("wandb has no API key (run `wandb login`); this run is logged offline")
            mode = "offline"
        arguments: dict[str, Any] = {
            "project": config.log.wandb_project,
            "name": Path(config.run.dir).name,
            "dir": config.run.dir,
            "config": config.model_dump(mode="json") | {"resumed_from_step": self._done_steps},
            "settings": wandb.Settings(
                silent=True, console="off", init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, **PRIVATE
            ),
        }
        try:
            return wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode == "offline":
                raise
            self._warn(f"wandb cannot be reached ({_first_line(error)}); this run is logged offline")
            return wandb.init(mode="offline", **arguments)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _flat(record: Record) -> Record:
    """A record as wandb draws it: numbers only, one curve a K, one a source, one a phase."""
    flat = {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
    for group in ("epochs", "phases_s"):
        flat |= {f"{group}/{name}": value for name, value in record.get(group, {}).items()}
    for name, layers in record.get("channels", {}).items():  # means over layers: one curve a channel
        means = np.atleast_2d(layers).mean(axis=0).tolist()
        flat |= {f"channels/{name}_k{k:02d}": value for k, value in enumerate(means, start=1)}
    for name in ("valid_loss", "valid_accuracy"):
        flat |= {f"valid/{name.removeprefix('valid_')}_k{k}": value for k, value in record.get(name, {}).items()}
    return flat | {f"valid/bits_per_byte_k{k}": value for k, value in record.get("valid", {}).items()}


def _curve_over_budgets(record: Record) -> Record:
    """A validation as a plot over K beside the lines over steps that `_flat` makes; wandb keeps one a step."""
    if not record.get("valid"):
        return {}
    import wandb

    table = wandb.Table(columns=["K", "bits per byte"], data=[[int(k), bits] for k, bits in record["valid"].items()])
    return {"valid/over_k": wandb.plot.line(table, "K", "bits per byte", title="validation bits per byte over K")}
