"""TensorBoard's files of a run, in RUN_DIR/tensorboard: `tensorboard --logdir runs` shows all runs below.

Each start adds a file that tells TensorBoard to pass over what others have beyond the checkpoint it continues from.
"""

from __future__ import annotations

from typing import Any

from megassm.config.schema import Config
from megassm.errors import install_hint
from megassm.run.directory import TENSORBOARD
from megassm.run.lines import Record
from megassm.run.tracker import flat

FLUSH_S = 20
"""A record is on disk so much later, at most."""


class TensorBoardSink:
    """The curves of a run, as TensorBoard reads them."""

    name = "TensorBoard"

    def __init__(self, config: Config, done_steps: int) -> None:
        self._folder = f"{config.run.dir}/{TENSORBOARD}"
        self._done_steps = done_steps
        self._writer: Any = None

    def open(self) -> bool:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RuntimeError(f"it is not installed: {install_hint('tensorboard')}") from None
        self._writer = SummaryWriter(self._folder, purge_step=self._done_steps + 1, flush_secs=FLUSH_S)
        return False

    def log(self, record: Record) -> None:
        for name, value in flat(record).items():
            if isinstance(value, (int, float)) and name != "step":
                self._writer.add_scalar(name, value, record["step"], walltime=record.get("time"))

    def close(self) -> None:
        self._writer.close()

    def abandon(self) -> None:
        pass
