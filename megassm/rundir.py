"""The run directory, opened before anything is started; needs no torch.

RUN_DIR/config.yaml         the resolved configuration, itself valid as --config
RUN_DIR/environment.json    versions, devices, the peak rate that utilisation is measured against
RUN_DIR/metrics.jsonl       one object an update
RUN_DIR/checkpoints/        step-NNNNNNNN/, see `megassm.checkpoint`
RUN_DIR/sweep.*             tools/sweep_budgets.py
RUN_DIR/wandb/              wandb's own files
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megassm.cli import refusal_text
from megassm.config import Config
from megassm.configfile import dump_config
from megassm.errors import UserError


def open_run_directory(config: Config) -> None:
    """Makes the run directory and writes the resolved configuration there.

    Every rank tries it, before anything is started: so all refuse together where one would.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(config.run.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".config-", delete=False, encoding="utf-8") as file:
            file.write(dump_config(config))
        os.chmod(file.name, 0o644)
        os.replace(file.name, folder / "config.yaml")
    except OSError as error:
        raise UserError(
            f"run.dir = {config.run.dir!r}: cannot be written ({refusal_text(error)}); choose another with run.dir=DIR"
        ) from None
