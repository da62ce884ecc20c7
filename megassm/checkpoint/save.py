"""Saves checkpoints: copied by all ranks, written while training goes on, published whole, the oldest removed.

A checkpoint is written under a hidden name, gets its manifest when every rank's files are on disk, and is then
renamed: it is complete or it does not exist. The hidden name is the start's own (see `megassm.run.fence`), and the next
start removes it: what older ranks may still write can then not be published.

    begin     all ranks copy their share of the state to host memory; a thread of each writes it, to the disk
    advance   all shares are written: rank 0's thread makes the manifest, publishes and rotates
    advance   it is published: all ranks know whether there is a new checkpoint

One is under way at most. The threads send no messages and touch nothing that training changes; the ranks agree on each
move by the message that they exchange after an update anyway (`megassm.train.agreement`).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from megassm import __version__
from megassm.checkpoint import publish, tensor_file
from megassm.checkpoint.format import (
    AVERAGES,
    FORMAT,
    MOMENTS,
    WEIGHTS,
    Manifest,
    newest_checkpoint,
    tensor_key,
)
from megassm.checkpoint.identity import run_identity
from megassm.checkpoint.space import pin
from megassm.cli.arguments import error_text
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.parallel import state
from megassm.parallel.background import in_background
from megassm.parallel.engine import Engine
from megassm.parallel.state import Kind, State
from megassm.parallel.waiting import wait_for_all
from megassm.parallel.world import gather_texts
from megassm.run.directory import CHECKPOINTS, step_name
from megassm.run.fence import Fence
from megassm.run.opening import clear_partial

FILES: dict[str, tuple[Kind, ...]] = {WEIGHTS: ("weight",), MOMENTS: state.MOMENTS, AVERAGES: (state.AVERAGE,)}
"""What goes into a file of each kind."""


class Saved(NamedTuple):
    """How a save ended."""

    step: int
    failure: str
    """Why there is no new checkpoint (a full disk), and what was there is untouched; empty where there is one."""
    waited_s: float
    """How long training waited for it on this rank."""
    took_s: float
    """From its beginning to its end."""


class Saver:
    """Saves a run's checkpoints, one after another. All ranks call the same methods in the same order."""

    def __init__(self, engine: Engine, config: Config, data_fingerprint: str, fence: Fence) -> None:
        self._engine, self._config, self._fence = engine, config, fence
        self._fingerprint = data_fingerprint
        self._folder = Path(config.run.dir) / CHECKPOINTS
        self._mine = engine.collection.here
        self._copies: State = {}
        """Kept from save to save: new memory costs more than the copy."""
        self._work: Future[Any] | None = None
        self._publishing = False
        self._step, self._updates, self._began, self._waited_s = 0, 0, 0.0, 0.0
        self._written = 0
        self._pin = ""
        self._not_told_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._work is not None

    @property
    def ready(self) -> bool:
        """Whether this rank's thread has done its part of the save that is under way."""
        return self._work is not None and self._work.done()

    def begin(self, step: int) -> Saved | None:
        """Copies the state after `step` updates, and begins to write it; none must be under way.

        Returns:
            None, or how it has ended already: there is no room for it.

        Raises:
            SupersededError: on rank 0, where a newer start of the run has taken over.
        """
        assert not self.busy
        world = self._engine.world
        self._step, self._began, self._waited_s = step, time.perf_counter(), 0.0
        with self._counted():
            world.progress.note("checkpoint, beginning")
            if world.is_main:
                self._fence.check()
                clear_partial(Path(self._config.run.dir))
            failure = gather_texts(publish.make(self._partial, self._config) if world.is_main else "")[0]
            if not failure:
                self._copy()
                self._work = in_background(self._write_share)
                return None
            if world.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
        return self._ended(failure)

    def advance(self) -> Saved | None:
        """The next move of the save that is under way, once all ranks are `ready`; how it ended, if that was the last.

        Raises:
            SupersededError: as `begin`.
        """
        assert self._work is not None
        is_main = self._engine.world.is_main
        with self._counted():
            self._engine.world.progress.note("checkpoint, publication")
            if self._publishing:
                failure = gather_texts(self._work.result() if is_main else "")[0]
            else:
                shares = [json.loads(text) for text in gather_texts(json.dumps(self._work.result()))]
                failure = next((f"rank {rank}: {share}" for rank, share in enumerate(shares) if _failed(share)), "")
                if not failure:
                    files = {name: (facts[0], facts[1]) for share in shares for name, facts in share.items()}
                    self._work = in_background(lambda: self._publish(files) if is_main else "")
                    self._publishing = True
                    return None
                if is_main:
                    shutil.rmtree(self._partial, ignore_errors=True)
        return self._ended(failure)

    def finish(self) -> Saved | None:
        """Waits until no save is under way; how the one that was has ended, if there was one.

        Raises:
            SupersededError: as `begin`.
            UserError: a disk has taken nothing for `parallel.timeout_s` seconds.
        """
        ended = None
        while self.busy:
            with self._counted():
                self._wait()
            ended = self.advance()
        return ended

    def pin(self, why: str) -> Path | None:
        """Keeps the newest checkpoint for good, and says why there; of one that is under way as soon as it is whole.

        Returns:
            Its folder, if there is one. Called on rank 0 alone.
        """
        if self.busy:
            self._pin = why
            return self._folder / step_name(self._step)
        checkpoint, _ = newest_checkpoint(Path(self._config.run.dir), check=None)
        if checkpoint is not None:
            pin(checkpoint.folder, why)
        return None if checkpoint is None else checkpoint.folder

    def take_waited_s(self) -> float:
        """How long training has waited for saves since this was asked last."""
        seconds, self._not_told_s = self._not_told_s, 0.0
        return seconds

    @property
    def _partial(self) -> Path:
        return self._folder / f".partial-{step_name(self._step)}-{self._fence.number:04d}"

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._waited_s += seconds
            self._not_told_s += seconds

    def _copy(self) -> None:
        self._engine.read_state(self._engine.kinds, self._copies)
        self._updates, self._written = self._engine.applied_updates, 0

    def _wait(self) -> None:
        """Until the threads of all ranks have done their part."""
        limit, work = self._config.parallel.timeout_s, cast(Future[Any], self._work)
        world = self._engine.world
        if stuck := wait_for_all(world, work, "checkpoint, writing files", lambda: self._written, limit):
            raise UserError(
                f"{self._partial}: the disk has taken nothing from rank {', '.join(map(str, stuck[:8]))} for "
                f"parallel.timeout_s = {limit} seconds; see to the disk, and start again: the same command "
                "continues from the last checkpoint"
            )

    def _ended(self, failure: str) -> Saved:
        self._work, self._publishing = None, False
        why, self._pin = self._pin, ""
        if why:
            self.pin(why)
        return Saved(self._step, failure, self._waited_s, time.perf_counter() - self._began)

    def _write_share(self) -> dict[str, tuple[int, int]] | str:
        """Writes this rank's parameters; returns size and checksum of its files, or what went wrong. In a thread."""
        world = self._engine.world
        number = f"{world.rank + 1:05d}-of-{world.size:05d}"
        files = {}
        try:
            for title, kinds in FILES.items():
                if not set(kinds) <= set(self._engine.kinds):
                    continue
                tensors = {tensor_key(name, kind): self._copies[name][kind] for name in self._mine for kind in kinds}
                path = self._partial / f"{title}-{number}.safetensors"
                files[path.name] = tensor_file.write_tensors(path, tensors, self._wrote)
        except OSError as error:
            return error_text(error)
        return files

    def _wrote(self, count: int) -> None:
        self._written += count

    def _publish(self, files: Mapping[str, tuple[int, int]]) -> str:
        """Returns why there is no new checkpoint, if there is none. In a thread of rank 0."""
        self._fence.check()
        try:
            publish.publish(self._partial, self._folder / step_name(self._step), self._manifest(files))
            publish.rotate(self._folder, self._config, newest=self._step)
        except OSError as error:
            shutil.rmtree(self._partial, ignore_errors=True)
            return error_text(error)
        return ""

    def _manifest(self, files: Mapping[str, tuple[int, int]]) -> Manifest:
        config = self._config
        manifest = Manifest(
            format=FORMAT,
            step=self._step,
            tokens=self._step * config.tokens_per_step(),
            updates=self._updates,
            mesh=self._engine.shape,
            identity=run_identity(config, self._fingerprint),
            config=config.model_dump(mode="json"),
            files=dict(files),
            version=__version__,
        )
        return replace(manifest, checksum=manifest.own_checksum())


def _failed(share: object) -> bool:
    return isinstance(share, str)
