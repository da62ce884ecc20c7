"""Compares runs on one HTML page that needs no network: loss, quality over K, speed, events, what differs.

A journal of any length is read in bounded memory; its curves have at most 1,000 points.
"""

from __future__ import annotations

import os
from pathlib import Path

from megassm.cli.arguments import Parser, output_file, path_argument, tool_parser, write_json


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/report.py runs/a runs/b --output compared.html")
    result.add_argument("runs", type=path_argument, nargs="+", metavar="RUN_DIR", help="run directories")
    what = "the page (default: report.html)"
    result.add_argument("--output", type=output_file, default=Path("report.html"), metavar="FILE.html", help=what)
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.report.run_files import check_run_directory
    from megassm.report.run_page import write_run_page

    for run_dir in arguments.runs:
        check_run_directory(run_dir)
    write_json(write_run_page(arguments.runs, arguments.output), arguments.json)
    print(os.path.relpath(arguments.output))
