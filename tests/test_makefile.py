"""What the Makefile hands on, without installing anything."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ([], []),
        (["TEXT=my notes/", "GLOB=*.md"], ["--text", "my notes/", "--glob", "*.md"]),
        (["TEXT=it's (here)/"], ["--text", "it's (here)/"]),
    ],
)
def test_the_demo_is_given_its_text_whatever_the_name(
    tmp_path: Path, variables: list[str], expected: list[str]
) -> None:
    environment = tmp_path / "an environment"
    (environment / "bin").mkdir(parents=True)
    said = environment / "bin/python"
    said.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n', encoding="utf-8")
    said.chmod(0o755)
    (environment / ".base").touch()
    (tmp_path / "environment").symlink_to(environment)
    done = subprocess.run(
        ["make", "--no-print-directory", "demo", "VENV=" + str(tmp_path / "environment"), *variables],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["tools/demo.py", *expected]
