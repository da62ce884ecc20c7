"""One page that compares runs: what they reached, how fast, what happened, what differs between them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from megassm.files import write_atomically
from megassm.report.charts import places
from megassm.report.history import History
from megassm.report.html import Cell, definitions, document, findings, folded, note, number, plots, table, words
from megassm.report.loaded import LoadedRun, load_run
from megassm.report.run_files import event_text, event_time, planned_steps
from megassm.report.run_findings import findings_of
from megassm.report.run_plots import optimiser_charts, quality_charts, speed_charts

EVENTS_OPEN = 12
"""Shown before a reader asks for all: the newest, without those of every day."""
ROUTINE = ("checkpoint",)
BUDGETS_SHOWN = 8
"""Columns of validation before a reader asks for all, spread evenly."""
MORE_OF_A_RUN = ("planned", "tokens", "validated at step", "MFU, median of all", "GiB")
PLACES = ("run.dir",)
"""Knobs that differ between any two runs."""

MEANINGS = {
    "loss": "Nats a token, mean over the global batch, at the K drawn for the update; so it moves with K. Runs of "
    "different tokenizers are not drawn together: their tokens are not alike. Bits per byte are comparable.",
    "points of a curve": "Means over neighbouring updates where a run has more than 1,000; the loss then has a band "
    "from the smallest to the largest. Noisy curves are drawn faintly behind their running mean.",
    "median of newest": "Of the newest updates, at most 50; 90%: their middle part.",
    "validation": "Bits per byte of the validation text (negative log-likelihood in bits over UTF-8 bytes); of a task, "
    "nats an answer. \u00b1: its standard error over sequences, as if they were drawn at random; the difference of "
    "two runs on one text is known better.",
    "MFU": "Model FLOPs of the K in use over the peak rate of the environment table, all ranks.",
    "tokens/s, MFU of the summary": "Medians over the curve's points.",
    "hours": "Time inside updates: without start-up, validation and saving.",
    "skipped": "Updates whose loss or gradient was not finite, and that changed no weight.",
}


def write_run_page(run_dirs: Sequence[Path], path: Path) -> list[dict[str, Any]]:
    """Writes the page; returns the summary's figures, a row a run.

    Raises:
        UserError: a path is not a run directory.
    """
    runs = [load_run(run_dir, name) for run_dir, name in zip(run_dirs, _names(run_dirs), strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render(runs).encode())
    return [summary(run) for run in runs]


def render(runs: Sequence[LoadedRun]) -> str:
    """The whole file."""
    histories = {run.name: run.history for run in runs if run.history.records}
    tokenizers = {run.name: run.tokenizer for run in runs}
    sections = {
        "Findings": findings(findings_of(runs)),
        "Summary": table([_summary_cells(run, runs) for run in runs], alarms=("failed",), more=MORE_OF_A_RUN),
    }
    charts = {
        "Quality": quality_charts(histories, tokenizers) if histories else [],
        "Speed": speed_charts(histories) if histories else [],
        "Optimiser": optimiser_charts(histories) if histories else [],
    }
    for heading, drawn in charts.items():
        sections[heading] = plots(drawn) if drawn else note("No update yet.")
    sections["Quality"] = _by_budget(runs) + sections["Quality"]
    sections["Events"] = _events(runs)
    sections["Configuration"] = _configuration(runs)
    sections["Environment"] = folded("Every start's", _facts({run.name: run.environment for run in runs}, "fact"))
    sections["What the figures mean"] = folded("Units and words", definitions(MEANINGS))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(title, "; ".join(run.name for run in runs) if len(runs) > 1 else runs[0].state, sections)


def summary(run: LoadedRun) -> dict[str, Any]:
    """A run's newest and typical figures; None where the run has none."""
    history = run.history
    newest = history.newest or {}
    step, _, valid = history.validations[-1] if history.validations else (None, None, {})
    return {
        "run": run.name,
        "state": run.state,
        "steps": newest.get("step"),
        "planned": planned_steps(run.knobs),
        "tokens": newest.get("tokens"),
        "loss": history.now("loss"),
        "validated at step": step,
        "valid at full K": valid[max(valid)] if valid else None,
        "valid at smallest K": valid[min(valid)] if valid else None,
        "in": history.validated if valid else "",
        "tokens/s": _typical(history, "tokens_per_s"),
        "MFU": _typical(history, "mfu"),
        "hours": history.seconds / 3600,
        "skipped": history.skipped,
        "GiB": None if (peak := newest.get("peak_memory_bytes")) is None else peak / 2**30,
    }


def _summary_cells(run: LoadedRun, runs: Sequence[LoadedRun]) -> dict[str, Cell]:
    styles = {"loss": ".4f", "valid at full K": ".4f", "valid at smallest K": ".4f", "tokens/s": ",.0f",
              "MFU": ".1%", "hours": ",.2f", "GiB": ",.2f"}  # fmt: skip
    figures = summary(run)
    texts = {name: words(figures.pop(name)) for name in ("run", "state", "in")}
    newest = max(len(one.history.recent) for one in runs)
    shown = {
        "loss": f"loss, median of newest {newest}",
        "tokens/s": "tokens/s, median of all",
        "MFU": "MFU, median of all",
    }
    return texts | {shown.get(name, name): number(value, styles.get(name, ",d")) for name, value in figures.items()}


def _by_budget(runs: Sequence[LoadedRun]) -> Markup:
    """The newest validation of each run, a column a K; a table for each unit."""
    parts = []
    for unit in dict.fromkeys(run.history.validated for run in runs if run.history.validations):
        own = [run for run in runs if run.history.validations and run.history.validated == unit]
        budgets = sorted({k for run in own for k in run.history.validations[-1][2]})
        rows = []
        for run in own:
            step, _, scores = run.history.validations[-1]
            cells = {f"K={k}": _with_error(scores.get(k), run.history.errors.get(k)) for k in budgets}
            rows.append({f"{unit}, newest validation": words(run.name), "step": number(step, ",d")} | cells)
        spread = {budgets[round(place * (len(budgets) - 1))] for place in places(BUDGETS_SHOWN)}
        parts.append(table(rows, more=[f"K={k}" for k in budgets if k not in spread]))
    return Markup("").join(parts)


def _with_error(score: float | None, error: float | None) -> Cell:
    return number(score, ".4f", "" if score is None or error is None else f" \u00b1 {error:.4f}")


def _typical(history: History, field: str) -> float | None:
    values = [mean for _, mean in history.series(field)]
    return statistics.median(values) if values else None


def _events(runs: Sequence[LoadedRun]) -> Markup:
    rows = [
        {
            "run": words(run.name),
            "time": words(event_time(event)),
            "step": number(step if isinstance(step := event.get("step"), int) else None, ",d"),
            "kind": words(str(event.get("kind", "event"))),
            "text": words(event_text(event)),
        }
        for run in runs
        for event in reversed(run.events)
    ]
    if not rows:
        return note("None.")
    older = [f"{run.event_count - len(run.events):,} older of {run.name} are left out."
             for run in runs if run.event_count > len(run.events)]  # fmt: skip
    newest = [row for row in rows if row["kind"][0] not in ROUTINE][:EVENTS_OPEN]
    every = folded(f"All {len(rows):,} events", table(rows) + Markup("").join(note(text) for text in older))
    return (table(newest) if newest else note("Nothing but checkpoints.")) + every


def _configuration(runs: Sequence[LoadedRun]) -> Markup:
    """What differs between the runs; of a single one, all of it."""
    if len(runs) == 1:
        return folded("Every knob", _facts({runs[0].name: runs[0].knobs}, "knob"))
    knobs = [knob for knob in _union(run.knobs for run in runs) if knob not in PLACES]
    differing = [knob for knob in knobs if len({repr(run.knobs.get(knob)) for run in runs}) > 1]
    if not differing:
        return note("The runs have the same configuration.")
    return _facts({run.name: {knob: run.knobs.get(knob, "\u2013") for knob in differing} for run in runs}, "knob")


def _facts(of_runs: Mapping[str, Mapping[str, Any]], what: str) -> Markup:
    """A row a fact, a column a run."""
    names = _union(of_runs.values())
    if not names:
        return note("Not recorded.")
    return table(
        [
            {what: words(name)} | {run: words(_shown(facts.get(name, "\u2013"))) for run, facts in of_runs.items()}
            for name in names
        ]
    )


def _shown(value: Any) -> str:
    match value:
        case bool() | None:
            return {True: "true", False: "false", None: "null"}[value]  # as the YAML has it
        case float():
            return f"{value:.6g}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _union(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """The folders' own names where they tell the runs apart, else the paths as they were given."""
    own = [path.absolute().name for path in run_dirs]
    return own if len(set(own)) == len(own) else [str(path) for path in run_dirs]
