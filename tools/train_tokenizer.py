"""Trains a SentencePiece tokenizer that loses nothing; see `megassm.data.tokenizer.base`."""

from megassm.cli.arguments import run_tool
from megassm.commands.tokenizer import main

if __name__ == "__main__":
    run_tool(main)
