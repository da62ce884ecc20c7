"""Cuts a trained model to a budget K, or to a family of them, as folders that megassm and transformers open."""

from megassm.cli.arguments import run_tool
from megassm.commands.export import main

if __name__ == "__main__":
    run_tool(main)
