"""Compares runs on one HTML page that needs no network: loss, quality over K, speed, events, what differs."""

from megassm.cli.arguments import run_tool
from megassm.commands.report import main

if __name__ == "__main__":
    run_tool(main)
