"""Part of `make lint`: files below 350 lines, functions below 50, signature and docstring included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from megassm.cli.arguments import Parser

ROOT = Path(__file__).parents[1]
FOLDERS = ("megassm", "launch", "tools")
FILE_LINES, FUNCTION_LINES = 350, 50


def too_long(path: Path, text: str) -> Iterator[str]:
    """A message for the file and for each function that reaches a limit."""
    if (lines := len(text.splitlines())) >= FILE_LINES:
        yield f"{path}: {lines} lines; a file has fewer than {FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= FUNCTION_LINES:
                what = f"{node.name} has {length} lines; a function has fewer than {FUNCTION_LINES}"
                yield f"{path}:{node.lineno}: {what}"


def main() -> int:
    Parser(__doc__ or "", "python tools/check_sizes.py").parse_args()
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    found = [line for path in paths for line in too_long(path.relative_to(ROOT), path.read_text(encoding="utf-8"))]
    print("\n".join(found) if found else f"{len(paths)} files within {FILE_LINES} and {FUNCTION_LINES} lines")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
