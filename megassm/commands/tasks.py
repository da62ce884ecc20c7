"""Runs language-model tasks at several budgets K with one load, by the EleutherAI harness, and prints one table.

The tasks read local files and ask nothing of a hub: lambada_test, hellaswag_val, piqa_val and arc_easy_test, each
.jsonl or .jsonl.gz, in the folder of --data; examples have the fields of the hub's data sets (piqa: goal sol1 sol2
label), or query, choices and gold. Texts longer than model.seq_len lose their beginning (--max-length). For
other tasks import `megassm.eval.harness` and use lm_eval's own `simple_evaluate("megassm", ...)`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megassm.cli.arguments import Parser, add_ema, budget_list, positive, print_table, tool_parser
from megassm.cli.progress import shown_progress


def parser() -> Parser:
    example = (
        "python tools/evaluate_tasks.py runs/demo --data data/eval --tasks lambada,piqa --budgets 2,8,32 --limit 100"
    )
    result = tool_parser(__doc__ or "", example)
    what = "run directory, one of its checkpoints/step-*, or an exported model"
    result.add_argument("run", type=Path, metavar="RUN_DIR", help=what)
    add_ema(result)
    result.add_argument("--tasks", required=True, metavar="LIST", help="lambada, hellaswag, piqa, arc_easy")
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K (default: K_max)")
    result.add_argument("--limit", type=positive, metavar="N", help="examples of each task (default: all)")
    result.add_argument("--data", metavar="DIR", help="the tasks' files (default: $MEGASSM_EVAL_DATA)")
    result.add_argument("--max-length", type=positive, metavar="L", help="tokens of a text (default: model.seq_len)")
    result.add_argument("--batch", type=positive, default=16, metavar="B", help="texts at a time (default: 16)")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def main() -> None:
    arguments = parser().parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm_eval's progress bars
    try:
        from megassm.eval.harness import MegaSSMLM, evaluate_tasks
    except ModuleNotFoundError as error:
        from megassm.errors import UserError, install_hint

        raise UserError(f"{error.name} is not installed: {install_hint('eval')}") from None
    from megassm.eval.session import open_for_text

    if arguments.data:
        os.environ["MEGASSM_EVAL_DATA"] = arguments.data
    opened = open_for_text(arguments.run, None, arguments.device, arguments.ema)
    model = MegaSSMLM(opened, max_length=arguments.max_length, batch_size=arguments.batch)
    budgets = arguments.budgets or [opened.model.config.num_channels]
    with shown_progress(not sys.stderr.isatty()) as progress, progress.busy("evaluate"):  # lm_eval has bars of its own
        rows = evaluate_tasks(model, arguments.tasks.split(","), budgets, arguments.limit)
    print_table(opened.title, rows, arguments.json)
