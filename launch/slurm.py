"""Runs a configuration under SLURM: submit, status, logs, cancel, resume."""

from megassm.cli.arguments import run_tool
from megassm.commands.slurm import main

if __name__ == "__main__":
    run_tool(main)
