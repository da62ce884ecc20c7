"""What a plot is made of: colours that everyone tells apart, running means, the words that stand for it."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from megassm.report.charts import (
    DARK,
    DARK_RAMP,
    LIGHT,
    LIGHT_RAMP,
    Chart,
    Line,
    budget_ticks,
    in_words,
    places,
    ramp,
    smoothed,
)
from tests.conftest import ROOT

PAGE = (ROOT / "megassm/report/templates/page.html").read_text(encoding="utf-8")
LIGHT_PAPER, DARK_PAPER = (dict(re.findall(r"--(\w+): (#\w{6})", part))
                           for part in PAGE.split("@media screen")[:2])  # fmt: skip
BLINDNESS = {
    "none": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "no red": (0.152286, 1.052583, -0.204868, 0.114503, 0.786281, 0.099216, -0.003882, -0.048116, 1.051998),
    "no green": (0.367322, 0.860646, -0.227968, 0.280085, 0.672501, 0.047413, -0.01182, 0.04294, 0.968881),
    "no blue": (1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039),
}
"""Machado, Oliveira, Fernandes 2009, at full severity: rows of a 3 x 3 matrix for linear RGB."""
TO_XYZ = (0.4124564, 0.3575761, 0.1804375, 0.2126729, 0.7151522, 0.072175, 0.0193339, 0.119192, 0.9503041)

Floats = npt.NDArray[np.float64]


def linear(colour: str) -> Floats:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """WCAG 2's."""
    low, high = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (first, second))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: Floats) -> Floats:
    xyz = np.reshape(TO_XYZ, (3, 3)) @ rgb.clip(0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize(("paper", "lines", "stops"), [(LIGHT_PAPER, LIGHT, LIGHT_RAMP), (DARK_PAPER, DARK, DARK_RAMP)])
def test_colours_are_seen_on_the_paper_and_told_apart_by_everyone(
    paper: dict[str, str], lines: tuple[str, ...], stops: tuple[str, ...]
) -> None:
    assert len(paper) == 6
    for text in ("ink", "faint", "alarm"):
        for ground in ("paper", "head"):
            assert contrast(paper[text], paper[ground]) >= 4.5, (text, ground)
    drawn = [*lines, *(ramp(stops, place) for place in places(25))]
    assert min(contrast(colour, paper["paper"]) for colour in drawn) >= 3
    for sight, matrix in BLINDNESS.items():
        seen = {colour: lab(np.reshape(matrix, (3, 3)) @ linear(colour)) for colour in lines}
        apart = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(lines, 2)}
        assert min(apart.values()) > 15, (sight, min(apart, key=lambda pair: float(apart[pair])))


def test_a_ramp_passes_its_stops() -> None:
    assert [ramp(("#000000", "#102030", "#ffffff"), place) for place in (0, 0.25, 0.5, 1)] == [
        "#000000", "#081018", "#102030", "#ffffff",
    ]  # fmt: skip
    assert (places(1), places(3)) == ([0.0], [0.0, 0.5, 1.0])
    assert budget_ticks([1, 2, 15, 16]) == [1, 2, 16]


def test_a_running_mean_where_points_are_many() -> None:
    assert smoothed([1.0, None, 3.0]) == ([1.0, None, 3.0], ())
    values = [float(i % 2) for i in range(160)]
    values[80] = None  # type: ignore[call-overload]
    mean, raw = smoothed(values)
    assert raw is values
    assert mean[80] is None
    assert mean[40] == pytest.approx(2 / 5), "of two to either side"
    assert mean[79] == pytest.approx(3 / 4), "without what is missing"
    assert mean[0] == pytest.approx(1 / 3)


def test_a_plot_in_words() -> None:
    lines = [Line(f"run {n}", {"updates": [1, 2000], "hours": [0.1, 5]}, [3.5, 2.25]) for n in range(9)]
    chart = Chart("loss", "nats", [Line("gone", {"updates": [1]}, [None]), *lines])
    said = in_words(chart)
    assert said.startswith("loss: nats over updates. run 0: 3.5 at updates 1, 2.25 at 2,000; lowest 2.25, highest 3.5.")
    assert said.endswith("And 2 more.")
    assert "gone" not in said
