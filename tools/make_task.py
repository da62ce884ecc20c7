"""Makes the data set of a task with labels: drawn (recall, high_frequency, listops), or from your files."""

from megassm.cli.arguments import run_tool
from megassm.commands.make_task import main

if __name__ == "__main__":
    run_tool(main)
