"""Cuts a trained model to a budget K, or to a family of them, as folders that megassm and transformers open.

Each is written with its tokenizer and a card, read back, and checked against the whole model on validation text.
`--seq-len` sets model.seq_len of the export and derives its filters for that length. Filters are not weights: no weight
changes, nor the file's size. But they are not the filters that the weights were trained with: the leading ones hardly
depend on the length, the high ones do. Table and card have the quality with both, on sequences of that length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megassm.cli.arguments import Parser, add_beyond, add_ema, budget_list, positive, print_table, tool_parser
from megassm.cli.mixtures import Limit, layers_text, mixture
from megassm.cli.progress import shown_progress

DTYPES = ("float32", "bfloat16")


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/export.py runs/demo --all --budgets 2,8,32")
    result.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory, or one of its checkpoints/step-*")
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--k", type=positive, metavar="K", help="spectral channels to keep")
    what.add_argument("--all", action="store_true", help="a family: a folder for each of --budgets, and one card")
    by_layer = (
        "one K a layer, such as 16/8/4/8; or a limit to search one under: parameters=N, mflops=N (forward, a token), "
        "ms=N (a decoded token, here)"
    )
    what.add_argument("--mix", type=mixture, metavar="K/K/..", help=by_layer)
    which = "with --all the K, with a limit the K that a layer may have (default: eval.budgets)"
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help=which)
    result.add_argument(
        "--output", type=Path, metavar="DIR", help="default: RUN_DIR/export, for one K RUN_DIR/export/k-K"
    )
    result.add_argument("--dtype", choices=DTYPES, default="float32", help="of the file (default: float32)")
    result.add_argument("--seq-len", type=positive, metavar="L", help="length to derive the filters for (see above)")
    add_beyond(result)
    result.add_argument(
        "--sequences", type=positive, metavar="N", help="validation sequences to measure on (default: eval.sequences)"
    )
    result.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template of messages, kept for transformers"
    )
    add_ema(result)
    result.add_argument("--data", metavar="DIR", help="data set or text to check with (default: the run's own data)")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def main() -> None:
    options = parser()
    arguments = options.parse_args()
    if arguments.budgets and not (arguments.all or isinstance(arguments.mix, Limit)):
        options.error("--budgets is for --all, and for --mix with a limit; for one size give --k")
    import torch

    from megassm.eval.session import open_session
    from megassm.export.card import family_table
    from megassm.export.chat import read_chat_template
    from megassm.export.write import ExportPlan, Key, export_models, mixture_under
    from megassm.files import write_atomically

    session = open_session(arguments.run, arguments.data, arguments.device, arguments.ema)
    sequences = arguments.sequences or session.config.eval.sequences
    template = None if arguments.chat_template is None else read_chat_template(arguments.chat_template)
    plan = ExportPlan(getattr(torch, arguments.dtype), arguments.seq_len, sequences, template)
    family = arguments.output or session.run_dir / "export"
    if arguments.beyond:
        session.model.read_beyond(arguments.beyond)
    ladder = arguments.budgets or session.config.eval_budgets()
    budgets = ladder if arguments.all else [arguments.k] if arguments.k else []
    folders: dict[Key, Path] = {k: family / f"k-{k}" for k in budgets}
    with shown_progress() as progress:
        if arguments.mix:
            layers = arguments.mix
            if isinstance(layers, Limit):
                with progress.busy(f"search for one K a layer under {layers}"):
                    layers = mixture_under(session, layers, ladder, sequences)
            folders = {layers: family / f"k-{layers_text(layers).replace('/', '-')}"}
        if arguments.output and not arguments.all:
            folders = dict.fromkeys(folders, arguments.output)
        exported = export_models(session, folders, plan, progress)
    if arguments.all:
        title = f"# {session.run_dir.name}: one training run, {len(exported)} sizes\n\n"
        write_atomically(family / "README.md", (title + family_table(exported)).encode())
    rows = [_row(vars(model)) for model in exported]
    print_table(f"{arguments.run}, {session.checkpoint.title}", rows, arguments.json)


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """For the table: a path is text, what is None is left out, and the bits of a task are of an answer each."""
    names = {"bits_per_byte": "bits_per_answer"} if row["accuracy"] is not None else {}
    shown = {**row, "folder": str(row["folder"])}
    if (layers := shown.pop("layers")) is not None:
        shown["k"] = layers_text(layers)
    return {names.get(name, name): value for name, value in shown.items() if value is not None}
