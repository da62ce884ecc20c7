"""A page that needs nothing but itself: text, tables that sort, plots as SVG; nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from megassm.report.figures import Panel, inline_svg

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1d21; --faint: #5c6570; --line: #d5dae0; --head: #f2f4f7;
        --alarm: #a8201a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9aa4b0; --line: #363c44; --head: #20252b; --alarm: #ff8a80; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, figcaption, dd { color: var(--faint); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th.text, td.text { text-align: left; }
th { background: var(--head); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.alarm { color: var(--alarm); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$subtitle</p>
$sections
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => { const v = row.cells[column].dataset.value; return v === "" ? NaN : +v; };
    const text = row => row.cells[column].textContent;
    const compare = head.classList.contains("text")
      ? (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true })
      : (a, b) => (Number.isNaN(key(a)) - Number.isNaN(key(b))) || key(a) - key(b);
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)).forEach(row => body.append(row));
  }));
}
</script>
</body>
</html>
""")

Cell = tuple[str, float | str | None]
"""What is shown, and what is sorted by: a number, None for a missing one, or text."""


def document(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """The whole file; `sections` are bodies, already HTML, by heading."""
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{html}" for heading, html in sections.items())
    return PAGE.substitute(title=escape(title), subtitle=escape(subtitle), sections=body)


def plots(panels: Sequence[Panel], first: int = 0) -> str:
    """Every panel under its title, as many beside each other as the window has room for.

    `first` is how many plots the page has before these.
    """
    figures = [
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{inline_svg(panel, number)}</figure>"
        for number, panel in enumerate(panels, first)
    ]
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def definitions(meanings: Mapping[str, str]) -> str:
    """Terms and what they mean."""
    return (
        "<dl>\n" + "\n".join(f"<dt>{escape(t)}</dt><dd>{escape(text)}</dd>" for t, text in meanings.items()) + "\n</dl>"
    )


def number(value: float | None, style: str, unit: str = "") -> Cell:
    """A figure, or a dash for a missing one."""
    return ("\u2013", None) if value is None else (f"{value:{style}}{unit}", value)


def words(text: str) -> Cell:
    return text, text


def table(rows: Sequence[Mapping[str, Cell]], alarms: tuple[str, ...] = ()) -> str:
    """Rows of the same names; a click on one sorts. Texts that begin with one of `alarms` stand out."""
    names = list(rows[0])
    texts = {name for name in names if isinstance(rows[0][name][1], str)}
    head = "".join(
        f'<th scope="col"{_class(name in texts)}><button>{escape(name.strip())}</button></th>' for name in names
    )
    body = "\n".join(
        "<tr>" + "".join(_td(row[name], name in texts, alarms) for name in names) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def _td(cell: Cell, is_text: bool, alarms: tuple[str, ...]) -> str:
    shown, value = cell
    alarm = is_text and shown.startswith(alarms)
    data: Any = "" if is_text or value is None else repr(value)
    return f'<td{_class(is_text, alarm)} data-value="{data}">{escape(shown)}</td>'


def _class(is_text: bool, alarm: bool = False) -> str:
    names = " ".join(["text"] * is_text + ["alarm"] * alarm)
    return f' class="{names}"' if names else ""
