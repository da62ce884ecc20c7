"""What an experiment found, written down: points as JSON, a table over seeds with intervals, a plot.

NAME.json holds every figure as measured, with configuration, seeds, hardware and date. NAME.md is made from it, but for
what stands under its heading "Conclusion", which a person writes and the next run keeps.
"""

from __future__ import annotations

import io
import json
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot
from scipy.stats import t as student_t

from megassm import __version__
from megassm.config.changes import changes
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import write_atomically
from tools.experiments.measure import Point

CONFIDENCE = 0.95
CONCLUSION = "## Conclusion\n"
MAX_TICKS = 10
"""Of a plot whose x values are its ticks."""
MAX_LEGEND = 14
"""Curves of a panel that names them itself; of more, one legend stands beside the panels."""


@dataclass(frozen=True)
class Results:
    """Everything that is kept of an experiment."""

    name: str
    question: str
    claim: str
    command: str
    x_label: str
    arms: dict[str, list[str]]
    """Overrides by arm; the first is what the others are held against."""
    seeds: list[int]
    config: dict[str, Any]
    points: dict[str, list[list[Point]]]
    """By arm, by seed."""
    date: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Of arms that were measured before the others: which ("arms"), "command", "date", "hardware"."""


def read(path: Path) -> Results:
    """The results of a NAME.json.

    Raises:
        UserError: it is none.
    """
    try:
        stored = Results(**json.loads(path.read_bytes()))
        points = {arm: [[Point(*each) for each in seed] for seed in seeds] for arm, seeds in stored.points.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the results of an experiment ({error}); run.py writes them") from None
    return replace(stored, points=points)


def refuse_others(old: Results, new: Results) -> None:
    """
    Raises:
        UserError: they are not of the same seeds and configuration.
    """
    others = [f"{each.knob} {each.before}, not {each.now}" for each in changes(_config(old), _config(new))]
    if old.seeds != new.seeds:
        others.append(f"seeds {old.seeds}, not {new.seeds}")
    if others:
        raise UserError(f"{old.name}.json: the stored results are of {'; '.join(others)}; add what was measured as "
                        "they were, or leave out --add, and these take their place")  # fmt: skip


def joined(old: Results, new: Results) -> Results:
    """Both, where arms of `new` take the place of those of their name; the first arm stays the first.

    Raises:
        UserError: as `refuse_others`.
    """
    refuse_others(old, new)
    left = [{**part, "arms": [arm for arm in part["arms"] if arm not in new.arms]} for part in _parts(old)]
    points = dict(old.points)
    for curve, by_seed in new.points.items():
        shared = curve in old.points and curve not in new.arms
        points[curve] = [_with(*both) for both in zip(old.points[curve], by_seed, strict=True)] if shared else by_seed
    earlier = [part for part in left if part["arms"]]
    return replace(new, arms={**old.arms, **new.arms}, points=points, earlier=earlier)


def _config(results: Results) -> Config:
    """Knobs that there were not yet have what was done without them."""
    try:
        return Config.model_validate_json(json.dumps(results.config))
    except ValueError as error:
        raise UserError(f"{results.name}.json: its configuration cannot be read today ({error})") from None


def _with(old: Sequence[Point], new: Sequence[Point]) -> list[Point]:
    """A curve of several arms: points of `new` take the place of those at their x; by metric, in order of x."""
    found = {(point.metric, point.series, point.x): point for point in (*old, *new)}
    places = {name: place for place, name in enumerate(dict.fromkeys(key[:2] for key in found))}
    return sorted(found.values(), key=lambda point: (places[point.metric, point.series], point.x))


@dataclass(frozen=True)
class Curve:
    """One arm's points of one metric over seeds."""

    label: str
    x: list[float]
    """Means over seeds."""
    y_SN: np.ndarray[Any, np.dtype[np.float64]]

    @property
    def mean(self) -> list[float]:
        return [float(value) for value in self.y_SN.mean(0)]

    @property
    def half(self) -> list[float] | None:
        """Half the width of the interval of the mean over seeds (Student's t); None for one seed."""
        return half_width(self.y_SN)


def half_width(values_SN: np.ndarray[Any, np.dtype[np.float64]]) -> list[float] | None:
    count = len(values_SN)
    if count < 2:
        return None
    factor = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) / count**0.5
    return [float(value) for value in values_SN.std(0, ddof=1) * factor]


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores, {platform.machine()}",
        "threads of a training": torch.get_num_threads(),
        "torch": torch.__version__,
        "megassm": __version__,
    }


def curves(results: Results, metric: str) -> list[Curve]:
    """Every arm's curves of a metric, those of one arm together."""
    found = []
    for arm, by_seed in results.points.items():
        for series in dict.fromkeys(point.series for point in by_seed[0] if point.metric == metric):
            chosen = [
                [point for point in points if (point.metric, point.series) == (metric, series)] for points in by_seed
            ]
            label = ", ".join(part for part in (arm, series) if part)
            x = np.mean([[point.x for point in points] for points in chosen], axis=0).tolist()
            found.append(Curve(label, x, np.array([[point.y for point in points] for points in chosen])))
    return found


def metrics(results: Results) -> list[str]:
    return list(dict.fromkeys(point.metric for points in results.points.values() for point in points[0]))


def write(results: Results, folder: Path) -> list[Path]:
    """Writes NAME.json, NAME.png and NAME.md below `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / results.name
    as_json = json.dumps(asdict(results), indent=1) + "\n"
    write_atomically(base.with_suffix(".json"), as_json.encode())
    write_atomically(base.with_suffix(".png"), draw(results))
    text = page(results) + conclusion(base.with_suffix(".md"))
    write_atomically(base.with_suffix(".md"), text.encode())
    return [base.with_suffix(suffix) for suffix in (".md", ".json", ".png")]


def conclusion(path: Path) -> str:
    """What a person has written, or the place for it."""
    if path.exists():
        _, heading, text = path.read_text(encoding="utf-8").partition(CONCLUSION)
        if heading:
            return heading + text
    return f"{CONCLUSION}\nNot written yet.\n"


def page(results: Results) -> str:
    """The experiment for people, in Markdown, up to its conclusion."""
    parts = [
        f"# {results.name}\n",
        f"{results.question}\n",
        f"*The paper (arXiv 2601.22488):* {results.claim}\n",
        *_sources(results),
        f"Seeds {', '.join(map(str, results.seeds))}. Every figure, and the whole configuration, is in "
        f"[{results.name}.json]({results.name}.json).\n",
        "| arm | differs from the configuration by |\n|---|---|",
        *(
            f"| {arm} | {' '.join(f'`{text}`' for text in overrides) or '-'} |"
            for arm, overrides in results.arms.items()
        ),
        "",
    ]
    parts += [f"{table(results, metric)}\n" for metric in metrics(results)]
    return "\n".join([*parts, f"![{results.name}]({results.name}.png)\n\n"])


def _sources(results: Results) -> Iterator[str]:
    """Commands, and when and on what they ran; of several also which arms are whose."""
    for part in _parts(results):
        facts = "; ".join(f"{name}: {value}" for name, value in part["hardware"].items())
        yield f"```bash\n{part['command']}\n```\n"
        yield f"Measured {part['date']}; {facts}" + f": {'; '.join(part['arms'])}" * bool(results.earlier) + ".\n"


def _parts(results: Results) -> list[dict[str, Any]]:
    """`earlier`, and what was measured last."""
    known = {arm for part in results.earlier for arm in part["arms"]}
    last = {"arms": [arm for arm in results.arms if arm not in known], "command": results.command}
    return [*results.earlier, {**last, "date": results.date, "hardware": results.hardware}]


def table(results: Results, metric: str) -> str:
    """Means over seeds with their 95% intervals, and what the arms differ by from the first on the same seeds."""
    shown = curves(results, metric)
    lines = [f"{metric}; mean over {len(results.seeds)} seed(s)" + " and its 95% interval" * (len(results.seeds) > 1)]
    for group in _same_x(shown):
        lines += ["", _row([results.x_label, *map(_number, group[0].x)]), _row(["---"] * (len(group[0].x) + 1))]
        for curve in group:
            lines.append(_row([curve.label, *_cells(curve.mean, curve.half)]))
    differences = _differences(shown)
    if differences:
        lines += ["", "Difference from the first arm, on the same seeds:", ""]
        lines += [_row([results.x_label, *map(_number, shown[0].x)]), _row(["---"] * (len(shown[0].x) + 1))]
        lines += differences
    return "\n".join(lines)


def _differences(shown: Sequence[Curve]) -> list[str]:
    """Of every curve at the x of the first."""
    rows = []
    for curve in shown[1:]:
        if curve.x != shown[0].x:
            continue
        gap_SN = curve.y_SN - shown[0].y_SN
        cells = _cells([float(value) for value in gap_SN.mean(0)], half_width(gap_SN), sign="+")
        rows.append(_row([curve.label, *cells]))
    return rows


def _same_x(shown: Sequence[Curve]) -> list[list[Curve]]:
    groups: dict[tuple[float, ...], list[Curve]] = {}
    for curve in shown:
        groups.setdefault(tuple(curve.x), []).append(curve)
    return list(groups.values())


def _cells(means: Sequence[float], halves: Sequence[float] | None, sign: str = "") -> list[str]:
    if halves is None:
        return [_number(mean, sign) for mean in means]
    return [f"{_number(mean, sign)} ± {_number(half)}" for mean, half in zip(means, halves, strict=True)]


def _number(value: float, sign: str = "") -> str:
    return (
        f"{value:{sign},.0f}"
        if abs(value) >= 100
        else f"{value:{sign}.4g}"
        if abs(value) >= 10
        else f"{value:{sign}.4f}".rstrip("0").rstrip(".")
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(results: Results) -> bytes:
    """A panel for each metric, PNG; bands are the 95% intervals."""
    names = metrics(results)
    figure, grid = pyplot.subplots(1, len(names), figsize=(6.2 * len(names), 4.6), layout="constrained", squeeze=False)
    many = len(results.points) > MAX_LEGEND
    for axes, metric in zip(grid.flat, names, strict=True):
        drawn = curves(results, metric)
        if many:
            axes.set_prop_cycle(color=pyplot.colormaps["turbo"](np.linspace(0, 1, len(drawn))))
        for curve in drawn:
            (line,) = axes.plot(curve.x, curve.mean, marker="o", markersize=4, label=curve.label)
            if curve.half is not None:
                low, high = np.array(curve.mean) - curve.half, np.array(curve.mean) + curve.half
                axes.fill_between(curve.x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        if len(ticks := sorted({x for curve in drawn for x in curve.x})) <= MAX_TICKS:
            axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.minorticks_off()
        axes.set(xlabel=results.x_label, ylabel=metric)
        axes.grid(alpha=0.3)
        if not many:
            axes.legend(fontsize="small")
    if many:
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", fontsize="xx-small", ncols=-(-len(labels) // 30))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
    return file.getvalue()
