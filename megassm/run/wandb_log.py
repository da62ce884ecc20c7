"""wandb is told every record: one run of its own for each run directory, however often that is started.

Offline needs no account. Online without a key, or without a server, falls back to offline with one warning.

The history has no update twice. Online it is cut at the checkpoint that a start continues from, where the server can do
that; elsewhere updates that are made again are not sent again, which is the same but where the configuration changed.
Offline nothing can be cut: records go to wandb's file once a checkpoint holds them. Each start has a file of its own;
`wandb sync` joins them, in order, to one run.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import write_atomically
from megassm.guarded import LINE_BYTES, Described, read_json
from megassm.run.directory import WANDB_RUN
from megassm.run.lines import Record
from megassm.run.tracker import first_line, flat

INIT_TIMEOUT_S = 30
"""A server that does not answer is given up after this, and 10 s that wandb adds."""
FINISH_TIMEOUT_S = 60
"""Uploads may take so long when training is done."""
IN_USE, ATTEMPTS, RELEASE_S = "is in use", 5, 1.0
"""What wandb says of a run's id that the refused request still holds for a moment."""
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


class WandbRun(Described):
    """The file `WANDB_RUN`: which run of wandb's a run directory is, and which directory that was."""

    id: str
    place: str
    inode: int


def run_id(run_dir: Path) -> str:
    """The run's id, drawn at its first start. A copy of a run directory is another run, and draws its own; one that was
    moved keeps it as far as can be seen: the same path, or the same folder of a file system."""
    path, place, inode = run_dir / WANDB_RUN, str(run_dir.resolve()), run_dir.stat().st_ino
    try:
        known = read_json(path, WandbRun, limit=LINE_BYTES)
        if place == known.place or inode == known.inode:
            return known.id
    except (OSError, UserError):
        pass
    own = WandbRun(id=secrets.token_hex(4), place=place, inode=inode)
    write_atomically(path, (json.dumps(own.model_dump()) + "\n").encode())
    return own.id


class WandbSink:
    """A run in wandb."""

    name = "wandb"

    def __init__(self, config: Config, done_steps: int, warn: Callable[[str], None]) -> None:
        self._config = config
        self._done_steps = done_steps
        self._warn = warn
        self._run: Any = None

    def open(self) -> bool:
        """Starts, or continues, the run. It never asks."""
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.pop("WANDB_SERVICE", None)  # that of a process that started this one never lets go of a run's id
        logging.raiseExceptions = False  # its log files print a page a line where the disk is full
        import wandb

        mode = self._config.log.wandb
        if mode == "online" and not wandb.api.api_key:
            self._warn("wandb has no API key (run `wandb login`); this run is logged offline")
            mode = "offline"
        if mode == "online":
            try:
                self._run = self._continued(wandb)
                return False
            except Exception as error:
                self._warn(f"wandb cannot be reached ({first_line(error)}); this run is logged offline")
                wandb.teardown()  # what was tried still holds the run's id
        self._run = wandb.init(mode="offline", resume="allow", **self._arguments(wandb))
        return True

    def log(self, record: Record) -> None:
        self._run.log(flat(record) | _curve_over_budgets(record), step=record["step"])

    def close(self) -> None:
        folder = Path(self._run.dir).parent
        try:
            self._run.finish()
        except TimeoutError:
            late = f"{FINISH_TIMEOUT_S} s after the end its server had not taken everything"
            raise UserError(f"{late}; `wandb sync {folder}` sends it") from None

    def abandon(self) -> None:
        import wandb

        wandb.teardown()  # it would try again, loudly, when Python exits

    def _continued(self, wandb: Any) -> Any:
        """An online run: cut at the checkpoint where the server can, else continued after what it has."""
        if self._done_steps:
            cut = self._arguments(wandb)
            cut["resume_from"] = f"{cut.pop('id')}?_step={self._done_steps}"
            try:
                return wandb.init(mode="online", **cut)
            except Exception:  # a server that cannot, or a run that it does not have
                wandb.teardown()
        return self._resumed(wandb, ATTEMPTS)

    def _resumed(self, wandb: Any, attempts: int) -> Any:
        try:  # other arguments than before: wandb writes what it is asked for into the settings that it is given
            return wandb.init(mode="online", resume="allow", **self._arguments(wandb))
        except Exception as error:
            if IN_USE not in str(error) or attempts == 1:
                raise
        wandb.teardown()
        time.sleep(RELEASE_S)
        return self._resumed(wandb, attempts - 1)

    def _arguments(self, wandb: Any) -> dict[str, Any]:
        config, log = self._config, self._config.log
        run_dir = Path(config.run.dir)
        return {
            "id": run_id(run_dir),
            "project": log.wandb_project,
            "entity": log.wandb_entity,
            "group": log.wandb_group,
            "tags": list(log.wandb_tags) or None,
            "name": log.wandb_name or run_dir.resolve().name,
            "dir": config.run.dir,
            "config": config.model_dump(mode="json") | {"resumed_from_step": self._done_steps},
            "allow_val_change": True,  # what is changed where a run continues
            "settings": wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_TIMEOUT_S,
                finish_timeout=FINISH_TIMEOUT_S,
                finish_timeout_raises=True,
                **PRIVATE,
            ),
        }


def _curve_over_budgets(record: Record) -> Record:
    """A validation as a plot over K beside the lines over steps that `flat` makes; wandb keeps one a step."""
    if not record.get("valid"):
        return {}
    import wandb

    table = wandb.Table(columns=["K", "bits per byte"], data=[[int(k), bits] for k, bits in record["valid"].items()])
    return {"valid/over_k": wandb.plot.line(table, "K", "bits per byte", title="validation bits per byte over K")}
