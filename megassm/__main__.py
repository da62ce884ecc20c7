"""The command `megassm`: one name for each of `megassm.commands`, which is imported when it is asked for."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "tokenizer": "train a tokenizer on text",
    "prepare": "turn text into a data set",
    "index": "index shards made elsewhere",
    "verify": "check a data set",
    "make_task": "make the data set of a labelled task",
    "plan": "what a run will need on a cluster",
    "train": "train a model; also torchrun -m megassm train, deepspeed --module megassm train",
    "branch": "begin a new run where another one was",
    "slurm": "queue runs under SLURM: submit, status, logs, cancel, resume",
    "watch": "watch a run in the terminal",
    "journal": "a run's figures as CSV",
    "inspect": "the text of any batch of a run",
    "diagnose": "look inside a run: gates, channels, warnings",
    "profile": "where the time of training goes",
    "sweep": "measure checkpoints over budgets K",
    "tasks": "language-model tasks at several budgets",
    "report": "compare runs on one page",
    "generate": "continue a prompt",
    "export": "cut a model to budgets, as folders",
}


def main() -> None:
    """Runs the command that the first word names, on the others."""
    if len(sys.argv) > 1 and sys.argv[1].startswith("--local_rank="):
        del sys.argv[1]  # `deepspeed --module megassm train` puts it first; LOCAL_RANK counts
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print("usage: megassm COMMAND ...\n\ncommands; each has --help:")
        print("\n".join(f"  {command:<10} {what}" for command, what in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"megassm: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    command = importlib.import_module(f"megassm.commands.{name}")
    sys.argv = [f"megassm {name}", *sys.argv[2:]]
    if name == "train":
        command.run()
    from megassm.cli.arguments import run_tool

    run_tool(command.main)


if __name__ == "__main__":
    main()
