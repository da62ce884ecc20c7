"""Does the best learning rate move with the width, and does muP (`megassm.optim`) keep it where it was?

Every width is trained at every learning rate, with one rate for all parameters and with muP from the smallest width on.
Trainings are ordinary runs, as those of `tools.experiments.runner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megassm.config.load import load_config
from tools.experiments.arms import Arm
from tools.experiments.definitions import TEXT
from tools.experiments.measure import Point, journal_points
from tools.experiments.results import Results
from tools.experiments.runner import placed, train_to_end

HEAD = 16
"""Dimensions of an attention head at every width."""
SMALL = (
    "model.pattern=SA", "model.num_channels=8", "model.seq_len=128", "budget.budgets=[2,4,8]", "eval.budgets=[8]",
    "optim.warmup_steps=12", "train.steps=120",
)  # fmt: skip
"""The experiments' model made smaller, with attention, so that a width takes minutes on one CPU core."""


@dataclass(frozen=True)
class RateSweep:
    """What to train."""

    widths: Sequence[int]
    """d_model, increasing, multiples of `HEAD`; muP takes over from the first."""
    rates: Sequence[float]
    """Peak learning rates, increasing."""
    seeds: Sequence[int]
    runs: Path
    """Where the trainings' run directories are."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` of all trainings, after `SMALL`."""


def sweep_arms(widths: Sequence[int]) -> list[Arm]:
    """The first width, where muP changes nothing, and two arms for each of the others."""
    arms = []
    for width in widths:
        shape = (f"model.d_model={width}", f"model.d_ffn={3 * width}", f"model.n_heads={width // HEAD}")
        if width == widths[0]:
            arms.append(Arm(f"d={width}", shape))
        else:
            arms.append(Arm(f"d={width}, one rate", shape))
            arms.append(Arm(f"d={width}, muP", (*shape, f"model.base_width={widths[0]}")))
    return arms


def run_sweep(sweep: RateSweep, command: str) -> Results:
    """Trains what is not trained yet, in this process, and returns what to write down.

    Raises:
        UserError: a training ended without its last checkpoint.
        ConfigError: a mistake in the configuration.
    """
    arms = sweep_arms(sweep.widths)
    points = {arm.name: [[_point(sweep, arm, rate, seed) for rate in sweep.rates] for seed in sweep.seeds]
              for arm in arms}  # fmt: skip
    return Results(
        name="lr_transfer",
        question="Does the best learning rate move with the width, and does muP keep it where it was?",
        claim="Not asked. muP: arXiv 2203.03466.",
        command=command,
        x_label="peak learning rate",
        arms={arm.name: list(arm.overrides) for arm in arms},
        seeds=list(sweep.seeds),
        config=load_config(Path(TEXT), (*SMALL, *sweep.overrides)).model_dump(mode="json"),
        points=points,
    )


def _point(sweep: RateSweep, arm: Arm, rate: float, seed: int) -> Point:
    """The validation of one training at full budget."""
    config = load_config(Path(TEXT), (*SMALL, *arm.overrides, *sweep.overrides, f"optim.lr={rate!r}"))
    config = placed(config, sweep.runs, seed)
    train_to_end(config)
    found = journal_points(Path(config.run.dir))[-1]
    print(f"{arm.name}, lr {rate:g}, seed {seed}: {found.y:.4f} {found.metric}", flush=True)
    return found._replace(metric=f"{found.metric} at K={found.x:g}", x=rate)


def best_rates(results: Results) -> dict[str, float]:
    """By arm, the learning rate with the least mean over the seeds."""
    best = {}
    for arm, by_seed in results.points.items():
        means = {group[0].x: sum(point.y for point in group) / len(group) for group in zip(*by_seed, strict=True)}
        best[arm] = min(means, key=lambda rate: means[rate])
    return best
