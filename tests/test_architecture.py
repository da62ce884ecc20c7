"""The picture and the tree of docs/architecture.md are the code's; sizes stay within the house rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.check_sizes import FILE_LINES, FUNCTION_LINES, too_long
from tools.draw_architecture import PICTURE, draw, floors, read_imports, reduced

IMPORTS = read_imports(ROOT / "megassm")


def test_the_picture_shows_the_imports_that_there_are() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(IMPORTS), "run python tools/draw_architecture.py"


def test_the_tree_has_every_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = text[text.index("```") : text.index("```", text.index("```") + 3)]
    names = set(re.findall(r"(\w+)(?:/|\.py)", tree))
    packages = {path.parent.name for path in (ROOT / "megassm").rglob("__init__.py")} - {"megassm"}
    assert not (packages | IMPORTS.keys()) - names, "name them in the tree of docs/architecture.md"


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    package = tmp_path / "house"
    (package / "top").mkdir(parents=True)
    (package / "top/a.py").write_text("import house.low\n\ndef f():\n    from house.middle import x\n")
    (package / "middle.py").write_text("from house import low\nimport json\n")
    (package / "low.py").write_text("")
    imports = read_imports(package)
    assert imports == {"top": {"low", "middle"}, "middle": {"low"}, "low": set()}
    assert floors(imports) == {"top": 2, "middle": 1, "low": 0}
    assert reduced(imports) == [("middle", "low"), ("top", "middle")]
    with pytest.raises(ValueError, match="a circle of imports: a -> b -> a"):
        floors({"a": {"b"}, "b": {"a"}})


def test_what_is_too_long_is_named() -> None:
    function = "def f():\n" + "    pass\n" * (FUNCTION_LINES - 2)
    assert list(too_long(Path("a.py"), function)) == []
    (said,) = too_long(Path("a.py"), "\n" + function + "    pass\n")
    assert said == "a.py:2: f has 50 lines; a function has fewer than 50"
    (said,) = too_long(Path("a.py"), "\n" * FILE_LINES)
    assert said == "a.py: 350 lines; a file has fewer than 350"


def test_no_tracked_file_is_a_link() -> None:
    """A link that somebody made in a checkout of theirs leads nowhere in the next."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a checkout that git reads: {listed.stderr.strip()}")
    assert listed.stdout
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]
