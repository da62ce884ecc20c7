"""A page that needs nothing but itself: text, tables that sort, plots; nothing is fetched from elsewhere.

What it looks like is in templates/: page.html the whole, parts.html what its sections are made of, charts.js how uPlot,
which the page carries whole, draws a `Chart`. All text is escaped there; only what these functions return is HTML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megassm.report.charts import DARK, DARK_RAMP, LIGHT, LIGHT_RAMP, Chart, Values, in_words

_TEMPLATES = Environment(loader=PackageLoader("megassm.report"), autoescape=True, undefined=StrictUndefined)
DIGITS = 5
"""Of the figures of a plot."""

Cell = tuple[str, float | str | None]
"""What is shown, and what is sorted by: a number, None for a missing one, or text."""


def document(title: str, subtitle: str, sections: Mapping[str, Markup]) -> str:
    """The whole file; `sections` are bodies by heading."""
    drawn = any("data-charts" in body for body in sections.values())
    colours = {"light": LIGHT, "dark": DARK, "light_ramp": LIGHT_RAMP, "dark_ramp": DARK_RAMP}
    page = _TEMPLATES.get_template("page.html")
    return (
        page.render(title=title, subtitle=subtitle, sections=sections, drawn=drawn, colours=colours, file=_file) + "\n"
    )


def plots(charts: Sequence[Chart]) -> Markup:
    """Every chart under its title, as many beside each other as the window has space for."""
    xs: list[Mapping[str, Sequence[float]]] = []
    data = [_chart_data(chart, xs) for chart in charts]
    shared = [{axis: _short(values) for axis, values in one.items()} for one in xs]
    described = [(chart.title, chart.y_label, chart.band, in_words(chart)) for chart in charts]
    return _part("plots", described, {"xs": shared, "charts": data}, any(len(chart.axes) > 1 for chart in charts))


def note(text: str) -> Markup:
    return _part("note", text)


def findings(groups: Mapping[str, Sequence[tuple[str, bool]]]) -> Markup:
    """What the figures say: sentences about each subject; the second of a pair makes one stand out."""
    return _part("findings", groups)


def definitions(meanings: Mapping[str, str]) -> Markup:
    """Terms and what they mean."""
    return _part("definitions", meanings)


def folded(summary: str, body: Markup) -> Markup:
    """A body that is not shown, nor printed, before it is asked for."""
    return _part("folded", summary, body)


def number(value: float | None, style: str, unit: str = "") -> Cell:
    """A figure, or a dash for a missing one."""
    return ("\u2013", None) if value is None else (f"{value:{style}}{unit}", value)


def words(text: str) -> Cell:
    return text, text


def table(rows: Sequence[Mapping[str, Cell]], alarms: tuple[str, ...] = (), more: Sequence[str] = ()) -> Markup:
    """Rows of the same names; a click on one sorts. Texts that begin with one of `alarms` stand out.

    The columns named in `more` are shown once a reader asks for all.
    """
    texts = {name for name, (_, value) in rows[0].items() if isinstance(value, str)}
    return _part("table", list(rows[0]), texts, rows, alarms, [name for name in more if name in rows[0]])


def _chart_data(chart: Chart, xs: list[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """As charts.js reads it; lines whose x are equal name the same place of `xs`."""
    lines = []
    for line in chart.lines:
        if line.x not in xs:
            xs.append(line.x)
        values = {name: _short(getattr(line, name)) for name in ("y", "low", "high", "raw") if getattr(line, name)}
        lines.append({"label": line.label, "x": xs.index(line.x), "place": line.place, **values})
    own = {"y_label": chart.y_label, "kind": chart.kind, "zero": chart.from_zero, "log": chart.log_y}
    return {**own, "ticks": list(chart.ticks), "mark": chart.mark, "lines": lines}


def _short(values: Values) -> list[float | None]:
    """Numbers of `DIGITS` digits, whole ones whole; null for what is missing or not finite."""
    return [
        None if value is None or not math.isfinite(value) else value if isinstance(value, int) else _rounded(value)
        for value in values
    ]


def _rounded(value: float) -> float:
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short


def _part(name: str, *values: object) -> Markup:
    """What a macro of parts.html makes of the values."""
    made: Markup = getattr(_TEMPLATES.get_template("parts.html").module, name)(*values)
    return made


@cache
def _file(name: str) -> Markup:
    """A file of templates/ that is no template."""
    return Markup((resources.files("megassm.report") / "templates" / name).read_text(encoding="utf-8"))
