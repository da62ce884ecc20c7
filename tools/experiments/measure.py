"""What is measured on a finished run: points of curves. Units stand in the metric's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.cost import parameters, training_flops_per_token
from megassm.data.dataset import open_dataset
from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.eval.session import open_session
from megassm.eval.speed import measured_cost
from megassm.model import LanguageModel, build_model, losses_at, truncate
from megassm.run.directory import CONFIG
from megassm.run.journal import Record, read_records
from tools.experiments.arms import Arm
from tools.experiments.peers import build_peer, peer_parameters
from tools.experiments.plain import Passes, drawn_passes, nested_passes, train_plain

BITS = "validation bits per byte"
ACCURACY = "validation accuracy"
BY_SIZE = " by size"
"""Ends the names of metrics over parameters, whose x are these."""
TRAINING = "training, PFLOPs"


def more_is_better(metric: str) -> bool:
    """Whether a learning rate is chosen for the most of it."""
    return "accuracy" in metric


class Point(NamedTuple):
    """One figure of one run."""

    metric: str
    series: str
    """Tells the curves of one metric apart; empty where there is one."""
    x: float
    y: float


def journal_points(run_dir: Path) -> list[Point]:
    """The run's last validation over K: accuracy where it has one, else bits per byte."""
    row = _last_validation(run_dir)
    metric, curve = (ACCURACY, row["valid_accuracy"]) if row.get("valid_accuracy") else (BITS, row["valid"])
    return [Point(metric, "", int(k), value) for k, value in curve.items()]


def family_points(run_dir: Path) -> list[Point]:
    """`journal_points`, the same over parameters, and what the training cost."""
    config = load_config(run_dir / CONFIG)
    curve = journal_points(run_dir)
    largest = parameters(config.model, int(max(point.x for point in curve)))
    return _with_sizes(curve, config, drawn_passes(config), at=largest)


def plain_points(config: Config, arm: Arm, device: torch.device) -> list[Point]:
    """The same of a training in the plain loop (`tools.experiments.plain`), done if that is not done yet."""
    passes = nested_passes(config, arm.recipe) if arm.recipe else drawn_passes(config)
    found = train_plain(config, arm.peer, device, None if arm.peer else passes, arm.basis)
    by_accuracy = open_dataset(config).task is not None
    metric = ACCURACY if by_accuracy else BITS
    curve = [Point(metric, "", k, score.accuracy if by_accuracy else score.bits_per_byte) for k, score in found.items()]
    if arm.peer is not None:
        peer = build_peer(arm.peer, config.model, 0)
        return [*curve, *(Point(metric + BY_SIZE, "", peer_parameters(peer, int(x)), y) for _, _, x, y in curve)]
    return _with_sizes(curve, config, passes, at=max(found))


def _with_sizes(curve: Sequence[Point], config: Config, passes: Passes, at: float) -> list[Point]:
    """A curve over K, the same over parameters, and at x = `at` the FLOPs of the training that gave it."""
    model = config.model
    flops = {k: training_flops_per_token(model, k, model.seq_len) for k in range(1, model.num_channels + 1)}
    rows = sum((part.last - part.first) * flops[part.k] for step in range(config.train.steps) for part in passes(step))
    by_size = [Point(point.metric + BY_SIZE, "", parameters(model, int(point.x)), point.y) for point in curve]
    return [*curve, *by_size, Point(TRAINING, "", at, rows * model.seq_len / 1e15)]


def position_points(run_dir: Path, factor: int) -> list[Point]:
    """Bits per byte by position in texts of `factor` trained lengths; a curve for each K and way to read beyond one."""
    session = open_session(run_dir, None, "auto")
    model, length = session.model.eval(), session.config.model.seq_len
    batches = session.validation(max(1, session.config.eval.sequences // factor), factor * length)
    if not batches:
        raise UserError(f"{session.config.data.path}: no {factor * length} tokens of validation text to read in one")
    ends = [length * 2**octave // 4 for octave in range((4 * factor).bit_length())]
    ways: dict[str, Literal["continue", "window"]] = {"": model.config.beyond}
    if "S" in model.config.mixers:
        ways = {", continued": "continue", ", windows": "window"}
    points = []
    for way, beyond in ways.items():
        model.read_beyond(beyond)
        for k in session.config.eval_budgets():
            bits_L, bytes_L = _by_position(model, batches, k, session.token_bytes)
            for first, end in zip([0, *ends], ends, strict=False):
                mean = bits_L[first:end].sum() / max(1.0, bytes_L[first:end].sum())
                points.append(Point(f"{BITS}, by position", f"K={k}{way}", end / length, float(mean)))
    return points


@torch.no_grad()
def _by_position(
    model: LanguageModel, batches: Sequence[MicroBatch], k: int, token_bytes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(L,) bits of what is predicted at each position, and its bytes; two texts at a time, for they are long."""
    bits_L, bytes_L = np.zeros(batches[0].mask_BL.shape[1]), np.zeros(batches[0].mask_BL.shape[1])
    device = model.embedding_VD.device
    for batch in batches:
        for first in range(0, len(batch.ids_BT), 2):
            ids_BT, mask_BL = batch.ids_BT[first : first + 2], batch.mask_BL[first : first + 2]
            nll_BL = losses_at(model, torch.from_numpy(ids_BT).to(device), k).double().cpu().numpy()
            bits_L += (nll_BL * mask_BL).sum(0) / np.log(2)
            bytes_L += (token_bytes[ids_BT[:, 1:]] * mask_BL).sum(0)
    return bits_L, bytes_L


def cost_points(run_dir: Path) -> list[Point]:
    """Speed of one process and memory of a freshly drawn model, cut to each of eval.budgets."""
    config = load_config(run_dir / CONFIG)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, config.run.seed)
    points = []
    for k in config.eval_budgets():
        cost = measured_cost(truncate(model, k).to(device).eval(), k, _random_batch(config), device)
        points += [
            Point("prefill, tokens/s", "", k, cost.prefill_tokens_per_s),
            Point("decoding, tokens/s", "", k, cost.decode_tokens_per_s or 0.0),
            Point("peak memory of a prefill, MiB", "", k, cost.peak_memory_mib),
        ]
    return points


def _random_batch(config: Config) -> MicroBatch:
    size, length = config.train.micro_batch_sequences, config.model.seq_len
    ids_BT = np.random.default_rng(0).integers(0, config.model.vocab_size, (size, length + 1))
    return MicroBatch(ids_BT, np.ones((size, length), dtype=np.bool_), np.arange(size))


def _last_validation(run_dir: Path) -> Record:
    validations: Iterator[Record] = (
        row for row in reversed(read_records(run_dir)) if {"valid", "valid_accuracy"} & row.keys()
    )
    return next(validations)
