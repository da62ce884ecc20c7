"""Draws docs/figures/architecture.svg from the imports that there are: python tools/draw_architecture.py

A box is a package or a module directly below megassm. It stands above everything that it imports; an arrow that
follows from two others is left out. A test holds the picture against the code.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

from megassm.cli.arguments import Parser

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/figures/architecture.svg"
WIDTH, BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT, TOP = 980, 96, 28, 74, 54

Imports = dict[str, set[str]]


def read_imports(package: Path) -> Imports:
    """What each member of a package imports of the others, lazily too."""
    imports: Imports = {}
    for path in sorted(package.rglob("*.py")):
        member = _member(path.relative_to(package))
        if member == "__init__":
            continue
        found = imports.setdefault(member, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found |= {name for name in _imported(node, package.name) if name != member}
    return {member: found & imports.keys() for member, found in imports.items()}


def _member(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _imported(node: ast.AST, package: str) -> set[str]:
    match node:
        case ast.ImportFrom(module=str(module)) if module == package:
            return {alias.name for alias in node.names}
        case ast.ImportFrom(module=str(module)) if module.startswith(f"{package}."):
            return {module.split(".")[1]}
        case ast.Import():
            return {alias.name.split(".")[1] for alias in node.names if alias.name.startswith(f"{package}.")}
    return set()


def floors(imports: Mapping[str, set[str]]) -> dict[str, int]:
    """The length of the longest way down from each member; 0 where nothing is imported.

    Raises:
        ValueError: members import each other in a circle.
    """
    found: dict[str, int] = {}

    def floor(member: str, above: tuple[str, ...]) -> int:
        if member in above:
            raise ValueError(f"a circle of imports: {' -> '.join((*above, member))}")
        if member not in found:
            found[member] = max((floor(below, (*above, member)) + 1 for below in sorted(imports[member])), default=0)
        return found[member]

    for member in sorted(imports):
        floor(member, ())
    return found


def reduced(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that follow from no others."""

    def below(member: str) -> set[str]:
        return imports[member].union(*(below(other) for other in imports[member]))

    return sorted(
        (member, other)
        for member, others in imports.items()
        for other in others
        if not any(other in below(third) for third in others - {other})
    )


def draw(imports: Mapping[str, set[str]]) -> str:
    """The SVG's text."""
    level = floors(imports)
    top = max(level.values())
    places = {}
    for floor in range(top + 1):
        members = sorted(member for member in imports if level[member] == floor)
        for number, member in enumerate(members):
            x = WIDTH * (number + 1) / (len(members) + 1)
            places[member] = (round(x), TOP + (top - floor) * FLOOR_HEIGHT)
    arrows = sum(map(len, imports.values()))
    height = TOP + top * FLOOR_HEIGHT + BOX_HEIGHT + 16
    title = f"{len(imports)} packages and modules on {top + 1} floors, {arrows} imports between them"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="15" fill="#333">megassm: {title}</text>',
    ]
    for member, other in reduced(imports):
        (x, y), (x_end, y_end) = places[member], places[other]
        start, end = y + BOX_HEIGHT, y_end
        bend = (end - start) // 2
        curve = f"M{x} {start}C{x} {start + bend} {x_end} {end - bend} {x_end} {end}"
        lines.append(f'<path d="{curve}" fill="none" stroke="#999" marker-end="url(#tip)"/>')
    for member, (x, y) in sorted(places.items()):
        box = f'x="{x - BOX_WIDTH // 2}" y="{y}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"'
        lines.append(f'<rect {box} fill="#eaf2fb" stroke="#4a78a8"/>')
        lines.append(f'<text x="{x}" y="{y + 19}" font-size="14" text-anchor="middle" fill="#123">{member}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def main() -> int:
    Parser(__doc__ or "", "python tools/draw_architecture.py").parse_args()
    PICTURE.write_text(draw(read_imports(ROOT / "megassm")), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
