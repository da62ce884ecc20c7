"""Looks at a run's updates while it trains: stragglers, loss spikes, what goes on inside the channels.

The main rank keeps the history and reports what it finds as events (`megassm.run.events`); the journal's records get
the figures. What changes training, the dropping of a spike's batch, is decided from one message, so alike on all ranks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from megassm.checkpoint.format import newest_checkpoint
from megassm.data.skipped import LeftOut
from megassm.eval.score import Score
from megassm.parallel.phases import StepPhase
from megassm.parallel.world import gather_rows, gather_texts, sum_rows
from megassm.run.directory import METRICS
from megassm.run.left_out import leave_out, read_left_out
from megassm.run.lines import Record, Unread
from megassm.run.records import records_newest_first
from megassm.train.agreement import Tally, Totals
from megassm.train.channels import OSCILLATION_RECORDS, GateMass, spectral_mixers, update_counts, warnings_of
from megassm.train.setup import Run
from megassm.train.spikes import Spikes
from megassm.train.stragglers import WINDOW, Straggler, Stragglers

DIGITS = 5
MAX_REWINDS = 3
"""To one checkpoint; then its loss jumps whatever is read, and the run goes on."""


class Health:
    """The main rank's view of a run's health; other ranks keep only what `drops` needs."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self._run = run
        self._stragglers = Stragglers(run.world.mesh.sequence * run.world.mesh.tensor)
        self._spikes = self._new_spikes(0)
        self._updates_K = np.zeros(config.model.num_channels, dtype=np.int64)
        self._records: deque[Record] = deque(maxlen=OSCILLATION_RECORDS)
        self._told: dict[tuple[int, str], int] = {}
        self._warned: set[str] = set()
        if run.journal is not None and run.done_steps:
            self._recall(Path(config.run.dir) / METRICS)

    def drops(self, budgets: list[int], tally: Tally) -> bool:
        """Whether the batch whose losses are in `tally` must change no weight; asked before its last backward pass.

        One small message between all ranks, but for where health.spike_action is report.
        """
        health = self._run.config.health
        if health.spike_action == "report":
            return False
        self._run.world.progress.note("agreement on the loss", phase=StepPhase.FORWARD)
        limit = self._spikes.limit(budgets) if self._run.world.is_main else 0.0
        rows = gather_rows([tally.nll.item(), tally.tokens, tally.text_bytes, limit])
        loss = Score.total(row[:3] for row in rows[:: self._run.world.mesh.tensor]).loss
        return loss > rows[0][3]

    def look(self, record: Record, totals: Totals) -> Record:
        """What is added to an update's record; reports what is wrong. Called on the main rank alone."""
        more: Record = {"phases_s": self._run.world.progress.phases()}
        slowest = self._stragglers.add(totals.seconds_RP)
        if slowest:
            more["slowest"] = {phase: rank._asdict() for phase, rank in slowest.items()}
        self._tell_of_stragglers(record["step"], slowest)
        if record["loss"] is not None and record["loss"] > self._spikes.limit(record["k_micro"]):
            more["spike"] = True
            self._tell_of_spike(record, totals.dropped)
        self._remember(record | more)
        return more

    def look_inside(self, record: Record) -> Record:
        """After a validation: what `channels` gave with the update counts, and the named failures of training."""
        more: Record = {}
        if "channels" in record:
            more["channels"] = record["channels"] | {"updates": self._updates_K.tolist()}
        self._records[-1] = self._records[-1] | {"valid": record.get("valid", {})}  # a task's accuracies are not bits
        found = warnings_of(list(self._records))
        for warning in found:
            if warning.name not in self._warned:
                text = f"step {record['step']}: {warning.name}: {warning.text}"
                self._run.events.add(warning.name, record["step"], text, **warning.figures)
        self._warned = {warning.name for warning in found}
        return more | ({"warnings": [asdict(warning) for warning in found]} if found else {})

    def _new_spikes(self, updates: int) -> Spikes:
        return Spikes(self._run.config.health.spike_z or float("inf"), updates)

    def _recall(self, journal: Path) -> None:
        """What the windows need of the updates before a resume, from the journal's end.

        A validation's record has the update counts up to it; only where there is none, all of the journal is read.
        """
        recent: list[Record] = []
        counted = "S" not in self._run.config.model.mixers
        counts_K = np.zeros_like(self._updates_K)
        unread = Unread(journal)
        for record, _ in records_newest_first(journal, unread):
            if len(recent) < OSCILLATION_RECORDS:
                recent.append(record)
            elif counted:
                break
            if not counted and "updates" in record.get("channels", {}):
                counts_K += record["channels"]["updates"]
                counted = True
            elif not counted and not record["skipped"]:
                counts_K += update_counts([record["k_micro"]], len(counts_K))
        unread.warn()
        self._spikes = self._new_spikes(recent[-1]["step"] - 1 if recent else 0)
        for record in reversed(recent):
            self._remember(record)
            if "valid" in record:
                self._warned = {warning["name"] for warning in record.get("warnings", ())}
        self._updates_K = counts_K

    def _remember(self, record: Record) -> None:
        self._records.append(record)
        self._spikes.add(record["k_micro"], record["loss"], record.get("spike", False))
        if not record["skipped"]:
            self._updates_K += update_counts([record["k_micro"]], len(self._updates_K))

    def _tell_of_stragglers(self, step: int, slowest: dict[str, Straggler]) -> None:
        """Once, and again only where it had gone for a window."""
        for phase, (rank, seconds, median_s) in slowest.items():
            if step - self._told.get((rank, phase), -WINDOW) >= WINDOW:
                text = (
                    f"step {step}: rank {rank} is slow: {phase} takes it {seconds:.3g} s an update, "
                    f"{seconds / max(median_s, 1e-9):.1f} times the others' {median_s:.3g} s (medians of {WINDOW})"
                )
                self._run.events.add("straggler", step, text, phase=phase, rank=rank, s=seconds, median_s=median_s)
            self._told[rank, phase] = step

    def _tell_of_spike(self, record: Record, dropped: bool) -> None:
        run, step = self._run, record["step"]
        expected, deviation = self._spikes.expected(record["k_micro"])
        first, last = run.sample_range(step - 1)
        z = (record["loss"] - expected) / deviation
        text = (
            f"step {step}: loss spike: {record['loss']:.4g}, where {expected:.4g} was to be expected at its K "
            f"({z:.1f} robust standard deviations): samples {first}..{last}"
            f"{' changed no weight' if dropped else ''}"
        )
        kept = run.saver.pin(text)
        text += f"; {kept} is kept" if kept else "; there is no checkpoint from before"
        run.events.add("loss spike", step, text, loss=record["loss"], expected=expected, z=z, samples=[first, last],
                       dropped=dropped, checkpoint=str(kept) if kept else None)  # fmt: skip


def channels(run: Run, masses: GateMass) -> Record:
    """Mean gate mass and Frobenius norm of M_k, (spectral layers, K_max), of the whole model and all ranks' text."""
    mixers = [mixer for _, mixer in spectral_mixers(run.engine.model)]
    if not mixers:
        return {}
    shape = (len(mixers), run.config.model.num_channels)
    mine = [*np.stack(masses.sums).ravel(), *masses.positions]
    for mixer in mixers:
        mine += run.engine.squares(mixer.channels_KDD)
    total = np.array(sum_rows(mine))
    sums, positions, squares = np.split(total, np.cumsum([shape[0] * shape[1], shape[0]]))
    gate_LK = sums.reshape(shape) / np.maximum(1, positions)[:, None]
    norm_LK = np.sqrt(squares.reshape(shape))
    return {"channels": {"gate_mass": gate_LK.round(DIGITS).tolist(), "norm": norm_LK.round(DIGITS).tolist()}}


def rewinds(run: Run, step: int) -> bool:
    """After a spike at update `step` (from 0): whether the run goes back to its newest checkpoint, on all ranks alike.

    The batches read since are passed over from there on (`megassm.data.skipped`). It stays where there is no
    checkpoint, or where it has gone back to that one `MAX_REWINDS` times.
    """
    told = ""
    if run.world.is_main:
        run_dir = Path(run.config.run.dir)
        checkpoint, _ = newest_checkpoint(run_dir, to_continue=True)
        done = -1 if checkpoint is None else checkpoint.manifest.step
        times = sum(entry.step == done for entry in read_left_out(run_dir))
        if done >= 0 and times < MAX_REWINDS:
            run.fence.check()
            leave_out(run_dir, LeftOut(done, step + 1 - done))
            told = f"step {step + 1}: back to step {done}; from there on {step + 1 - done} batches are passed over"
            run.events.add("rewind", step + 1, told, checkpoint=done, batches=step + 1 - done)
    return bool(gather_texts(told)[0])


def without_effect(objective_BL: torch.Tensor) -> torch.Tensor:
    """Losses whose gradient is not finite: the update is then dropped, on every rank and at every ZeRO stage."""
    return objective_BL * float("nan")
