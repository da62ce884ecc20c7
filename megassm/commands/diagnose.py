"""Looks inside a run: what its journal warns of, and gate mass, updates and norm of the channels, layer by layer.

The summary comes first; --all lists every channel, --plot draws their gate mass, --json has all figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megassm.cli.arguments import Parser, TableRow, image_file, positive, print_table, tool_parser, write_json
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.eval.session import Session

MOST_OF_THE_MASS = 0.9


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/diagnose.py runs/demo --rows 100")
    add = result.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run directory, or one of its checkpoints/step-*")
    what = "validation sequences that the gates are watched on (default: 8)"
    add("--sequences", type=positive, default=8, metavar="N", help=what)
    what = "newest journal records that the loss is judged by (default: 200)"
    add("--rows", type=positive, default=200, metavar="N", help=what)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--all", action="store_true", help="print every channel of every layer too")
    add("--plot", type=image_file, metavar="FILE.png", help="draw the gate mass of every channel there")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.eval.session import open_session
    from megassm.eval.watch import run_directory
    from megassm.run.directory import METRICS
    from megassm.run.journal import read_records
    from megassm.train.channels import loss_explained_by_budget, warnings_of

    session = open_session(arguments.run, None, arguments.device)
    step = session.checkpoint.manifest.step
    run_dir = run_directory(session.checkpoint)
    if not (run_dir / METRICS).exists():
        raise UserError(f"{run_dir}: has no {METRICS}; give the run directory that the checkpoint belongs to")
    records = [record for record in read_records(run_dir) if record["step"] <= step]
    channels = channel_rows(session, records, arguments.sequences)
    print(f"{arguments.run}, step {step}")
    found = warnings_of(records, arguments.rows)
    for warning in found:
        print(f"warning: {warning.name}: {warning.text}")
    explained, swing = loss_explained_by_budget(records, arguments.rows)
    print(
        ("" if found else "no warnings; ")
        + f"the drawn K explains {explained:.0%} of the loss variance, moving the loss by {swing:.1%} of its mean"
    )
    by_layer: dict[int, list[TableRow]] = {}
    for row in channels:
        by_layer.setdefault(row["layer"], []).append(row)
    highest = max((row["gate mass"] for row in channels), default=0.0)
    if by_layer:
        title = f"by spectral layer, at K={len(next(iter(by_layer.values())))}; gate mass from 0 to {highest:.3f}"
        print_table(title, [layer_row(layer, rows, highest) for layer, rows in by_layer.items()])
    if arguments.all:
        print_table("every channel", channels)
    else:
        print(f"--all prints the {len(channels)} channels one by one")
    write_json(channels, arguments.json)
    if arguments.plot and by_layer:
        draw(by_layer, arguments.plot)
        print(arguments.plot)


def channel_rows(session: Session, records: Sequence[Mapping[str, Any]], sequences: int) -> list[TableRow]:
    """A row for every channel of every spectral layer."""
    import torch

    from megassm.data.stream import StreamPlan, validation_batches
    from megassm.ops.documents import document_numbers
    from megassm.train.channels import channel_norms, gate_masses, update_counts

    config = session.config
    k_max = config.model.num_channels
    plan = StreamPlan(config.model.seq_len, 1, 1, seed=0)
    end = session.data.document_end(config)
    with gate_masses(session.model) as masses, torch.no_grad():
        for batch in validation_batches(session.data.valid, plan, sequences):
            ids_BL = torch.from_numpy(batch.ids_BT[:, :-1]).to(session.device)
            session.model(ids_BL, k_max, documents_BL=document_numbers(ids_BL, end))
    gate, norms = masses.mean(), channel_norms(session.model)
    updates = update_counts([record["k_micro"] for record in records if not record.get("skipped")], k_max)
    layers = [layer for layer, mixer in enumerate(config.model.mixers) if mixer == "S"]
    memory = [masses.memory(place) for place in range(len(layers))]
    fading = [{} if each is None else {"shortest memory": float(each.min()), "longest memory": float(each.max())}
              for each in memory]  # fmt: skip
    return [
        {"layer": layer, "channel": k + 1, "gate mass": float(gate[place, k]), "updates": int(updates[k]),
         "norm of M": float(norms[place, k]), **fading[place]}
        for place, layer in enumerate(layers)
        for k in range(k_max)
    ]  # fmt: skip


def layer_row(layer: int, channels: Sequence[TableRow], highest: float) -> TableRow:
    """A layer in one line; `highest` is the largest gate mass of all layers."""
    from megassm.report.braille import BLOCKS

    masses = [row["gate mass"] for row in channels]
    norms = [row["norm of M"] for row in channels]
    order = sorted(range(len(masses)), key=lambda k: -masses[k])
    enough, held = 0, 0.0
    while held < MOST_OF_THE_MASS * sum(masses) and enough < len(order):
        held += masses[order[enough]]
        enough += 1
    return {
        "layer": layer,
        "gate mass by channel": "".join(BLOCKS[round((len(BLOCKS) - 1) * mass / (highest or 1.0))] for mass in masses),
        "90% of it in": f"{enough} channels",
        "heaviest": order[0] + 1,
        "norm of M": f"{min(norms):.3g} to {max(norms):.3g}",
        "updates": f"{min(row['updates'] for row in channels):,} to {max(row['updates'] for row in channels):,}",
        **_memory(channels[0]),
    }


def _memory(row: TableRow) -> TableRow:
    """Of a selective layer: positions over which the past of its heads fades by e."""
    if "longest memory" not in row:
        return {}
    return {"memory of heads": f"{row['shortest memory']:.3g} to {row['longest memory']:.3g} positions"}


def draw(by_layer: Mapping[int, Sequence[TableRow]], path: Path) -> None:
    """A line a layer: gate mass over the channels."""
    from megassm.report.charts import Chart, Line, budget_ticks, places
    from megassm.report.figures import save_charts

    lines = [
        Line(
            f"layer {layer}",
            {"channel": [row["channel"] for row in rows]},
            [row["gate mass"] for row in rows],
            place=at,
        )
        for (layer, rows), at in zip(by_layer.items(), places(len(by_layer)), strict=True)
    ]
    ticks = budget_ticks([row["channel"] for row in next(iter(by_layer.values()))])
    save_charts([Chart("gate mass of every channel", "mean weight", lines, ticks=ticks)], path)
