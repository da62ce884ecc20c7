"""Quality and cost of one checkpoint over budgets: the curve that says how far a model may be truncated."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megassm.cost import forward_flops_per_token, parameters
from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.eval.memory import peak_tensor_bytes
from megassm.eval.score import Score, score
from megassm.eval.timing import timed_seconds
from megassm.model import LanguageModel, truncate
from megassm.ops.documents import document_numbers

TIMED_REPEATS = 5


@dataclass(frozen=True)
class BudgetRow:
    """One budget's line in the table."""

    k: int
    parameters: int
    bits_per_byte: float
    perplexity: float
    """Per token."""
    gap_percent: float
    """Bits per byte above those at full K, in percent of them."""
    forward_tokens_per_s: float
    peak_memory_mib: float
    """Weights and activations of a forward pass over one micro-batch."""
    forward_flops_per_token: float


def sweep(
    model: LanguageModel,
    batches: Sequence[MicroBatch],
    budgets: Sequence[int],
    token_bytes: npt.NDArray[np.int64],
    device: torch.device,
    document_end: int | None = None,
) -> list[BudgetRow]:
    """Cuts `model` to each budget and to K_max in turn, and measures the smaller model.

    Args:
        model: at full capacity, on any device.
        batches: the text, the same for every budget.
        budgets: K; K_max is added, for the gap.
        token_bytes: (V,) UTF-8 bytes of each token.
        device: where to compute.
        document_end: the id after which a new document begins, for a model that keeps documents apart.

    Raises:
        UserError: a budget beyond K_max, or no text.
    """
    k_max = model.config.num_channels
    beyond = [k for k in budgets if not 1 <= k <= k_max]
    if beyond:
        raise UserError(f"budgets {beyond}: must be between 1 and this model's K_max = {k_max}")
    if not batches:
        raise UserError("no validation text: the data set's valid/ is empty; prepare it with a --valid-fraction")
    measured = {k: _measure(model, k, batches, token_bytes, device, document_end) for k in sorted({*budgets, k_max})}
    full = measured[k_max][0].bits_per_byte
    return [
        BudgetRow(
            k=k,
            parameters=parameters(model.config, k),
            bits_per_byte=quality.bits_per_byte,
            perplexity=quality.perplexity,
            gap_percent=100 * (quality.bits_per_byte / full - 1),
            forward_tokens_per_s=rate,
            peak_memory_mib=memory / 2**20,
            forward_flops_per_token=forward_flops_per_token(model.config, k, model.config.seq_len),
        )
        for k, (quality, rate, memory) in measured.items()
    ]


def _measure(
    model: LanguageModel,
    k: int,
    batches: Sequence[MicroBatch],
    token_bytes: npt.NDArray[np.int64],
    device: torch.device,
    document_end: int | None,
) -> tuple[Score, float, int]:
    small = truncate(model, k).to(device).eval()

    def losses(ids_BT: Tensor, budget: int) -> Tensor:
        documents_BL = document_numbers(ids_BT[:, :-1], document_end)
        nll_BL: Tensor = small(ids_BT[:, :-1], budget, ids_BT[:, 1:], documents_BL)
        return nll_BL

    quality = score(losses, batches, k, token_bytes, device)
    ids_BL = torch.from_numpy(batches[0].ids_BT[:, :-1]).to(device)

    @torch.no_grad()
    def forward() -> None:
        small(ids_BL, k, documents_BL=document_numbers(ids_BL, document_end))

    rate = ids_BL.numel() / statistics.median(timed_seconds(forward, device, TIMED_REPEATS))
    return quality, rate, peak_tensor_bytes([*small.parameters(), *small.buffers()], forward, device)


def write_sweep(rows: Sequence[BudgetRow], folder: Path, title: str) -> list[Path]:
    """Writes sweep.json, sweep.csv and sweep.png into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"sweep.{suffix}" for suffix in ("json", "csv", "png")]
    records = [asdict(row) for row in rows]
    paths[0].write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    plot_sweeps({title: rows}, paths[2])
    return paths


def plot_sweeps(curves: Mapping[str, Sequence[BudgetRow]], path: Path) -> None:
    """Draws quality and speed against K, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullLocator

    figure, (quality, speed) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        (quality, "bits_per_byte", "validation bits per byte (lower is better)"),
        (speed, "forward_tokens_per_s", "forward tokens/s"),
    )
    for axes, field, label in panels:
        for name, rows in curves.items():
            axes.plot([row.k for row in rows], [getattr(row, field) for row in rows], marker="o", label=name)
        ticks = sorted({row.k for rows in curves.values() for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("budget K (spectral channels)")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    quality.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
