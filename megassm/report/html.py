"""A page that needs nothing but itself: text, tables that sort, plots as SVG; nothing is fetched from elsewhere.

What it looks like is in templates/: page.html the whole, parts.html what its sections are made of. All text is escaped
there; only what these functions return is HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megassm.report.figures import Panel, inline_svg

_TEMPLATES = Environment(loader=PackageLoader("megassm.report"), autoescape=True, undefined=StrictUndefined)

Cell = tuple[str, float | str | None]
"""What is shown, and what is sorted by: a number, None for a missing one, or text."""


def document(title: str, subtitle: str, sections: Mapping[str, Markup]) -> str:
    """The whole file; `sections` are bodies by heading."""
    return _TEMPLATES.get_template("page.html").render(title=title, subtitle=subtitle, sections=sections) + "\n"


def plots(panels: Sequence[Panel], first: int = 0) -> Markup:
    """Every panel under its title, as many beside each other as the window has space for.

    `first` is how many plots the page has before these.
    """
    return _part(
        "plots", [(panel.title, Markup(inline_svg(panel, number))) for number, panel in enumerate(panels, first)]
    )


def note(text: str) -> Markup:
    return _part("note", text)


def definitions(meanings: Mapping[str, str]) -> Markup:
    """Terms and what they mean."""
    return _part("definitions", meanings)


def number(value: float | None, style: str, unit: str = "") -> Cell:
    """A figure, or a dash for a missing one."""
    return ("\u2013", None) if value is None else (f"{value:{style}}{unit}", value)


def words(text: str) -> Cell:
    return text, text


def table(rows: Sequence[Mapping[str, Cell]], alarms: tuple[str, ...] = ()) -> Markup:
    """Rows of the same names; a click on one sorts. Texts that begin with one of `alarms` stand out."""
    texts = {name for name, (_, value) in rows[0].items() if isinstance(value, str)}
    return _part("table", list(rows[0]), texts, rows, alarms)


def _part(name: str, *values: object) -> Markup:
    """What a macro of parts.html makes of the values."""
    made: Markup = getattr(_TEMPLATES.get_template("parts.html").module, name)(*values)
    return made
