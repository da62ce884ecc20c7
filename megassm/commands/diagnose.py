"""Looks inside a run: gate mass, updates and norm of every channel, and what its journal warns of."""

from __future__ import annotations

from pathlib import Path

from megassm.cli.arguments import Parser, TableRow, positive, print_table, tool_parser
from megassm.errors import UserError


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/diagnose.py runs/demo --rows 100")
    what = "run directory, or one of its checkpoints/step-*"
    result.add_argument("run", type=Path, metavar="RUN_DIR", help=what)
    what = "validation sequences that the gates are watched on (default: 8)"
    result.add_argument("--sequences", type=positive, default=8, metavar="N", help=what)
    what = "newest journal records that the loss is judged by (default: 200)"
    result.add_argument("--rows", type=positive, default=200, metavar="N", help=what)
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def main() -> None:
    arguments = parser().parse_args()
    import torch

    from megassm.data.stream import StreamPlan, validation_batches
    from megassm.eval.session import open_session
    from megassm.eval.watch import run_directory
    from megassm.ops.documents import document_numbers
    from megassm.run.directory import METRICS
    from megassm.run.journal import read_records
    from megassm.train.channels import channel_norms, gate_masses, loss_explained_by_budget, update_counts, warnings_of

    session = open_session(arguments.run, None, arguments.device)
    config, step = session.config, session.checkpoint.manifest.step
    run_dir = run_directory(session.checkpoint)
    if not (run_dir / METRICS).exists():
        raise UserError(f"{run_dir}: has no {METRICS}; give the run directory that the checkpoint belongs to")
    records = [record for record in read_records(run_dir) if record["step"] <= step]
    plan = StreamPlan(config.model.seq_len, 1, 1, seed=0)
    end = session.data.document_end(config)
    with gate_masses(session.model) as masses, torch.no_grad():
        for batch in validation_batches(session.data.valid, plan, arguments.sequences):
            ids_BL = torch.from_numpy(batch.ids_BT[:, :-1]).to(session.device)
            session.model(ids_BL, config.model.num_channels, documents_BL=document_numbers(ids_BL, end))
    gate, norms = masses.mean(), channel_norms(session.model)
    updates = update_counts(
        [record["k_micro"] for record in records if not record.get("skipped")], config.model.num_channels
    )
    layers = [layer for layer, mixer in enumerate(config.model.mixers) if mixer == "S"]
    table: list[TableRow] = [
        {"layer": layer, "channel": k + 1, "gate mass": float(gate[place, k]), "updates": int(updates[k]),
         "norm of M": float(norms[place, k])}
        for place, layer in enumerate(layers)
        for k in range(config.model.num_channels)
    ]  # fmt: skip
    title = f"{arguments.run}, step {step}: every channel of every spectral layer, at K={config.model.num_channels}"
    print_table(title, table, arguments.json)
    explained, swing = loss_explained_by_budget(records, arguments.rows)
    print(f"the drawn K explains {explained:.0%} of the loss variance, moving the loss by {swing:.1%} of its mean")
    for warning in warnings_of(records, arguments.rows):
        print(f"warning: {warning.name}: {warning.text}")
