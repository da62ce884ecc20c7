"""Sweeps of runs: the checkpoint that was named, or every one that a live run publishes, as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from megassm.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    find_checkpoint,
    load_model,
    newest_checkpoint,
    read_checkpoint,
    with_average,
)
from megassm.cli.arguments import print_line
from megassm.cli.mixtures import Limit
from megassm.cli.progress import shown_progress
from megassm.config.schema import Config
from megassm.data.task import TaskTokenizer
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.eval.mix import Mixture
from megassm.eval.overlap import with_overlap
from megassm.eval.sweep import SweepPlan, sweep
from megassm.eval.swept import Sweep
from megassm.eval.text import EvalText, open_texts
from megassm.model import LanguageModel
from megassm.parallel.world import Peers, gather_texts, together
from megassm.run.directory import CHECKPOINTS, EMA, SWEEPS, checkpoint_folders, step_name, step_of
from megassm.run.launcher import launcher_is_gone, launcher_pids

POLL_S = 5.0
"""Between two looks for a new checkpoint."""
FINISHED = "finished"


@dataclass(frozen=True)
class SweepRequest:
    """What to measure; None is what the run's own configuration says."""

    budgets: Sequence[int] | None = None
    seq_lens: Sequence[int] | None = None
    """Tokens; None is the training length."""
    sequences: int | None = None
    """Of the training length."""
    data: Sequence[str] = ()
    """Prepared sets and texts; none is the run's own validation set."""
    glob: str | None = None
    averaged: bool = False
    """The running average of the weights."""
    agreement: bool = False
    """Also how often smaller budgets agree with the full one (`megassm.eval.overlap`)."""
    mixtures: Sequence[Mixture | Limit] = ()
    """One K a layer, or a limit to search one under."""
    beyond: Literal["continue", "window"] | None = None
    """How texts longer than the trained length are read; None is the model's own choice."""

    @property
    def is_plain(self) -> bool:
        """Whether it is of the run's own data at the length that it was trained at."""
        return not self.data and self.seq_lens is None

    def model(self, checkpoint: Checkpoint) -> LanguageModel:
        model = load_model(checkpoint)
        if self.beyond is not None:
            model.read_beyond(self.beyond)
        return model

    def plan(self, config: Config, tokenizer: Tokenizer) -> SweepPlan:
        is_task = isinstance(tokenizer, TaskTokenizer)
        if is_task and self.seq_lens not in (None, [config.model.seq_len]):
            raise UserError(
                f"--seq-lens: the examples of {tokenizer.name} are {config.model.seq_len} long; leave it out"
            )
        return SweepPlan(
            budgets=self.budgets or config.eval_budgets(),
            seq_lens=self.seq_lens or [config.model.seq_len],
            sequences=self.sequences or config.eval.sequences,
            micro_batch_sequences=config.train.micro_batch_sequences,
            document_end=tokenizer.eod if config.data.isolate_documents else None,
            is_task=is_task,
            mixtures=self.mixtures,
        )

    def open(self, checkpoint: Checkpoint) -> tuple[list[EvalText], Tokenizer]:
        return open_texts(checkpoint.config, self.data, self.glob, checkpoint.kept_tokenizer)


def result_folder(run_dir: Path, averaged: bool) -> Path:
    """Where a run's sweeps go."""
    return run_dir / EMA if averaged else run_dir


def run_directory(checkpoint: Checkpoint) -> Path:
    """RUN_DIR of RUN_DIR/checkpoints/step-N; a checkpoint that lies elsewhere is its own."""
    folder = checkpoint.folder.absolute()
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def sweep_path(path: Path, request: SweepRequest, peers: Peers) -> tuple[Sweep, Path]:
    """(the sweep of a run's newest complete checkpoint or of the one named, where its files go). All ranks call it.

    Raises:
        UserError: no checkpoint, no text, a budget or a length out of range.
    """
    # rank 0 chooses: a live run may publish another one between two ranks' looks
    folder = together(lambda: str(find_checkpoint(path, request.averaged).folder) if peers.is_main else "")
    checkpoint = read_checkpoint(Path(gather_texts(folder)[0]))
    checkpoint = with_average(checkpoint) if request.averaged else checkpoint
    model = together(lambda: request.model(checkpoint))
    texts = together(lambda: request.open(checkpoint))
    return _sweep(str(path), (checkpoint, model), texts, request, peers), result_folder(
        run_directory(checkpoint), request.averaged
    )


def watch(run_dir: Path, request: SweepRequest, peers: Peers) -> Iterator[Sweep]:
    """Sweeps each checkpoint of a run that has no RUN_DIR/sweeps/step-N.json yet, oldest first, and waits for more.

    Ends after the checkpoint of the run's last step. One that rotation removes meanwhile is passed over. All ranks
    call it.

    Raises:
        UserError: no such run directory, or as `sweep_path`.
    """
    together(lambda: _check_run_directory(run_dir))
    seen: set[str] = set()
    texts = None
    launcher = launcher_pids()
    while not launcher_is_gone(launcher):
        mine = together(lambda: _next_folder(run_dir, seen, request.averaged) if peers.is_main else "")
        folder = gather_texts(mine)[0]
        if folder == FINISHED:
            return
        if not folder:
            time.sleep(POLL_S)
            continue
        seen.add(folder)
        try:
            checkpoint, model = together(partial(_open, Path(folder), request))
        except UserError as error:
            if peers.is_main:
                print_line(f"passed over {folder}: {error}")
            continue
        texts = texts or together(partial(request.open, checkpoint))
        yield _sweep(str(run_dir), (checkpoint, model), texts, request, peers)


def sweep_file(folder: Path, step: int) -> Path:
    """Of a `result_folder`."""
    return folder / SWEEPS / f"{step_name(step)}.json"


def _sweep(
    name: str,
    opened: tuple[Checkpoint, LanguageModel],
    texts: tuple[list[EvalText], Tokenizer],
    request: SweepRequest,
    peers: Peers,
) -> Sweep:
    checkpoint, model = opened
    config = checkpoint.config
    tokenizer = texts[1]
    token_bytes = tokenizer.token_bytes()
    token_bytes.resize(config.model.vocab_size)  # zeros for ids of the model that the tokenizer has not
    with shown_progress(peers.is_main) as progress:
        plan = request.plan(config, tokenizer)
        curves = sweep(model, texts[0], plan, token_bytes, peers, progress)
        if request.agreement:
            curves = with_overlap(curves, model, texts[0], plan, peers)
    name += " (ema)" if request.averaged else ""
    return Sweep(name, checkpoint.manifest.step, config.model.seq_len, curves)


def _open(folder: Path, request: SweepRequest) -> tuple[Checkpoint, LanguageModel]:
    checkpoint = find_checkpoint(folder, request.averaged)
    return checkpoint, request.model(checkpoint)


def _check_run_directory(run_dir: Path) -> None:
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory; start the run first (launch/pretrain.py)")


def _next_folder(run_dir: Path, seen: set[str], averaged: bool) -> str:
    """The oldest checkpoint to be measured, FINISHED, or nothing yet."""
    found = [path for path in checkpoint_folders(run_dir / CHECKPOINTS) if step_of(path) is not None]
    for manifest in filter(Path.exists, [path / MANIFEST for path in found]):
        measured = result_folder(run_dir, averaged) / SWEEPS / f"{manifest.parent.name}.json"
        if str(manifest.parent) not in seen and not _is_measured(manifest, measured):
            return str(manifest.parent)
    newest, _ = newest_checkpoint(run_dir, check=None)
    return FINISHED if newest is not None and newest.manifest.step >= newest.config.train.steps else ""


def _is_measured(manifest: Path, result: Path) -> bool:
    """A result that is older than the checkpoint is of an earlier run in the same directory."""
    try:
        return result.stat().st_mtime >= manifest.stat().st_mtime
    except FileNotFoundError:
        return not manifest.exists()  # rotated away meanwhile
