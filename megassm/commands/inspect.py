"""Prints the exact text of any global batch of a run, past or to come."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, positive, print_line, tool_parser, write_json

if TYPE_CHECKING:
    from megassm.data.inspect import SampleText

END_OF_DOCUMENT = "<|end of document|>"


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/inspect_data.py runs/demo --step 100")
    result.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="run directory; its config.yaml and left_out.json count"
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of config.yaml")
    which = result.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=positive, metavar="N", help="the batch of the N-th update, as in metrics.jsonl")
    which.add_argument("--samples", type=sample_list, metavar="LIST", help="global sample numbers, such as 0,1,17")
    return result


def sample_list(text: str) -> list[int]:
    """Sample numbers from "0,1,17"; for argparse's `type`."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sample numbers such as 0,1,17")
    return [int(part) for part in text.split(",")]


def main() -> None:
    arguments = parser().parse_intermixed_args()
    from megassm.config.load import load_config_or_exit
    from megassm.data.inspect import read_samples, samples_of_update
    from megassm.run.directory import CONFIG
    from megassm.run.left_out import read_left_out

    # how a run is spread over ranks decides no batch, and must not be refused in this one process
    one_process = ["parallel.tensor=1", "parallel.sequence=1", "parallel.data=null"]
    alone = [*arguments.overrides, *one_process]
    config = load_config_or_exit(arguments.run / CONFIG, alone)
    left_out = read_left_out(arguments.run)
    samples = arguments.samples or samples_of_update(config, arguments.step, left_out)
    rows = []
    for sample in read_samples(config, samples, left_out):
        show(sample)
        rows.append(asdict(sample))
    write_json(rows, arguments.json)


def show(sample: SampleText) -> None:
    """For people: where it is from, then the text as it is, with a line where a document ends."""
    reader = f"update {sample.update}" if sample.update else "passed over"
    print_line(
        f"=== sample {sample.sample} ({reader}): {sample.source}, epoch {sample.epoch}, number "
        f"{sample.number}; {sample.tokens} tokens; {', '.join(sample.blocks)}"
    )
    if not sample.tokens:
        print("(masked: a block of it is damaged)")
    text = f"{END_OF_DOCUMENT}\n".join(sample.documents)
    print_line(text + END_OF_DOCUMENT if sample.ends_document else text)
