"""Runs what users of transformers do with a causal language model on ours and on a Llama, and prints who passes what.

Needs the extra `hf`, and no other library; docs/results/huggingface.md has its output. tools/check_huggingface.py runs
the libraries around transformers.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings

import torch

from megassm.cli.arguments import Parser, run_tool
from tools.hub_api import forward, generation, loading
from tools.hub_api.subject import CHECKS, KINDS, Subject

MODULES = (generation, forward, loading)
"""Importing them fills `CHECKS`."""


def failures(subject: Subject, only: str | None = None) -> dict[str, Exception]:
    """Runs all checks, or those whose name has `only` in it; what was raised by name."""
    found: dict[str, Exception] = {}
    for name, run in CHECKS.items():
        if only is None or only in name:
            torch.manual_seed(0)
            try:
                run(subject)
            except Exception as error:  # whatever it is, it is a line of the table
                found[name] = error
    return found


def main() -> None:
    parser = Parser(__doc__ or "", "python tools/check_hub_api.py > checks.md")
    parser.add_argument("--only", metavar="TEXT", help="checks whose name has this in it, with tracebacks")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {kind: failures(Subject(kind), only) for kind in KINDS}
    if only is not None:
        for kind, errors in found.items():
            for name, error in errors.items():
                print(f"{kind}: {name}", file=sys.stderr)
                traceback.print_exception(error)
    print(f"| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}")
    for name in (name for name in CHECKS if only is None or only in name):
        cells = [_cell(found[kind].get(name)) for kind in KINDS]
        print(f"| {name} | {' | '.join(cells)} |")
    if only is None:
        counts = [f"{len(CHECKS) - len(errors)} of {len(CHECKS)}" for errors in found.values()]
        print(f"| **passed** | {' | '.join(counts)} |")


def _cell(error: Exception | None) -> str:
    if error is None:
        return "yes"
    lines = str(error).strip().splitlines() or [""]
    return f"no: {type(error).__name__}: {lines[0][:80]}".replace("|", "/")


if __name__ == "__main__":
    run_tool(main)
