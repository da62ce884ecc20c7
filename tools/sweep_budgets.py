"""Measures checkpoints over budgets K: bits per byte, perplexity, parameters, FLOPs, speed, memory."""

from megassm.cli.arguments import run_tool
from megassm.commands.sweep import main

if __name__ == "__main__":
    run_tool(main)
