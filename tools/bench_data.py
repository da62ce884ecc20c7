"""Times the data plane in one process: folder, HTTP and S3, beside webdataset, a memmap and mosaicml-streaming."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

from megassm.cli.arguments import Parser, positive, print_table, run_tool, tool_parser
from megassm.cli.progress import shown_progress


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/bench_data.py --tokens 67108864 --seq-len 2048")
    add, default = result.add_argument, "(default: %(default)s)"
    add("--tokens", type=positive, default=64 << 20, metavar="N", help=f"of the data set that is made {default}")
    add("--block-tokens", type=positive, default=1 << 20, metavar="N", help=f"tokens fetched at once {default}")
    add("--seq-len", type=positive, default=2048, metavar="L", help=f"tokens a sequence {default}")
    add("--batch", type=positive, default=8, metavar="B", help=f"sequences a batch {default}")
    add("--repeats", type=positive, default=3, metavar="N", help=f"passes; the fastest counts {default}")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from tools.bench.data import DataBenchPlan, bench

    plan = DataBenchPlan(
        arguments.tokens, arguments.block_tokens, arguments.seq_len, arguments.batch, arguments.repeats
    )
    with tempfile.TemporaryDirectory() as work, shown_progress() as progress, progress.busy("bench"):
        rows = [asdict(row) for row in bench(plan, Path(work))]
    title = f"{plan.tokens:,} tokens, L={plan.seq_len}, B={plan.batch_sequences}, one process"
    print_table(title, rows, arguments.json)


if __name__ == "__main__":
    run_tool(main)
