"""Puts a run's quality beside what needs no network: counts of tokens (unigram, trigram with backoff), gzip and xz.

Every row predicts the same text, the beginning of the run's validation set; counts are made of its training set.
Where the run was swept (tools/sweep_budgets.py), the model is in the table at every budget. Writes baselines.json and
baselines.png to the run's directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megassm.cli.arguments import Parser, TableRow, print_table, run_tool, tool_parser
from megassm.cli.progress import shown_progress
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.eval.baselines import Baseline

SWEEP, TABLE, PICTURE = "sweep.json", "baselines.json", "baselines.png"


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/baselines.py runs/demo")
    result.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.eval.session import open_session

    session = open_session(arguments.run, None, "cpu")
    model = [] if session.data.task else _swept(session.run_dir / SWEEP)
    sequences = model[0]["sequences"] if model else session.config.eval.sequences
    with shown_progress() as progress, progress.busy("count"):
        simple = _simple(session, sequences)
    rows: list[TableRow] = [_row(f"the model, K={row['k']}", row["bits_per_byte"]) for row in model]
    rows = sorted([*rows, *(_row(*baseline) for baseline in simple)], key=lambda row: row["bits_per_byte"])
    print_table(f"{arguments.run}: the same text, predicted by", rows, arguments.json)
    (session.run_dir / TABLE).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    if model:
        _draw(session.run_dir, model, simple)


def _simple(session: Any, sequences: int) -> list[Baseline]:
    """The baselines on the first `sequences` validation sequences."""
    from megassm.eval.baselines import TRAINING_TOKENS, baselines, read_ids

    if session.data.task or len(session.data.valid.sources) > 1:
        raise UserError(f"{session.run_dir}: baselines are for a run on one data set of text")
    (train,), (valid,) = session.data.train.sources, session.data.valid.sources
    scored = sequences * session.config.model.seq_len + 1
    return baselines(read_ids(train.shards, TRAINING_TOKENS), read_ids(valid.shards, scored), session.tokenizer)


def _swept(path: Path) -> list[dict[str, Any]]:
    """The rows of the run's own text at the trained length, with the number of sequences; none without a sweep."""
    if not path.exists():
        return []
    sweep = json.loads(path.read_text(encoding="utf-8"))
    curve = next(curve for curve in sweep["curves"] if curve["seq_len"] == sweep["trained_seq_len"])
    return [{**row, "sequences": curve["sequences"]} for row in curve["rows"]]


def _row(name: str, bits_per_byte: float) -> dict[str, Any]:
    return {"predicted_by": name, "bits_per_byte": bits_per_byte}


def _draw(run_dir: Path, model: list[dict[str, Any]], simple: list[Baseline]) -> None:
    """The model over K, and a line for each baseline that is not far above."""
    from megassm.report.figures import Panel, budget_axis, save_panels

    budgets = [row["k"] for row in model]
    highest = 1.25 * max(row["bits_per_byte"] for row in model)

    def draw(axes: Any) -> None:
        axes.plot(
            budgets, [row["bits_per_byte"] for row in model], marker="o", label="one elastic model, cut to K channels"
        )
        for name, bits_per_byte in simple:
            if bits_per_byte <= highest:
                axes.axhline(bits_per_byte, color="grey", linewidth=1, linestyle="--")
                axes.annotate(name, (1, bits_per_byte), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                              fontsize="small", color="grey", xytext=(-3, 1), textcoords="offset points")  # fmt: skip
        budget_axis(axes, budgets)
        axes.set(xlabel="budget K", ylabel="bits per byte of held-out text")
        axes.legend(frameon=False, fontsize="small", loc="best")

    path = run_dir / PICTURE
    save_panels([Panel(f"{run_dir.name} (lower is better)", draw)], path)
    print(path)


if __name__ == "__main__":
    run_tool(main)
