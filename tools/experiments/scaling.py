"""An elastic scaling law: bits per byte over parameters, channels and training bytes, with what elasticity costs.

    loss(N, K, D) = E + A / N^a + B / D^b + C / K^c  [+ T (K_max / K)^t  where one training serves all budgets]

N are the parameters of the model cut to K, in millions, D the bytes of its training in tens of millions. T is then the
elastic tax at K_max, in bits. The experiment `scaling` trains models of seven shapes for up to four times each, and
models of one K alone; this tool fits the law to all but the two largest shapes, says what those will be, and compares:

    python -m tools.experiments.scaling docs/results/scaling.json --predict docs/results/scaling_prediction.json
    python -m tools.experiments.scaling docs/results/scaling.json --compare docs/results/scaling_prediction.json

A prediction is worth something if it was committed before the largest shapes were trained: the file names the runs
that it saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from megassm.cli.arguments import Parser, path_argument, print_table, run_tool
from megassm.config.model import ModelConfig
from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.errors import UserError
from megassm.files import write_atomically
from tools.experiments.arms import Arm
from tools.experiments.measure import BITS, BY_SIZE

Array = npt.NDArray[np.float64]

SHAPES = ((48, 2), (64, 2), (96, 2), (128, 3), (192, 3), (256, 4), (416, 5))
"""Width and layers; heads of 16 inputs, a feed-forward width of 2.5 d that stays: 0.1M to 10M parameters."""
BYTES_PER_PARAMETER = (5, 10, 20, 40)
MOST_BYTES = 80e6
"""Of a training: no text is read twice where there are 87 million bytes of books."""
ALONE, ALONE_TIME = 4, 20
"""So many of the smallest shapes are trained at each K alone too, for so many bytes a parameter."""
LARGEST = tuple(f"d={width}" for width, _ in SHAPES[-2:])
"""What the prediction is about."""

MILLION, TEN_MILLION = 1e6, 1e7
STARTS, RESAMPLES = 24, 40
ROBUST = 1e-3
"""Relative errors beyond this count linearly (Huber)."""
MOST_EXPONENT = 3.0


class Observed(NamedTuple):
    """One training at one budget."""

    training: str
    parameters: float
    k: float
    k_max: float
    data: float
    """Bytes of the training."""
    elastic: bool
    loss: float = 0.0


@dataclass(frozen=True)
class Law:
    """The constants above."""

    floor: float
    by_size: float
    size_exponent: float
    by_data: float
    data_exponent: float
    by_channels: float
    channel_exponent: float
    tax: float
    tax_exponent: float

    def losses(self, rows: Sequence[Observed]) -> Array:
        n, k, k_max, d, elastic = _columns(rows)
        found: Array = (
            self.floor
            + self.by_size * n**-self.size_exponent
            + self.by_data * d**-self.data_exponent
            + self.by_channels * k**-self.channel_exponent
            + elastic * self.tax * (k_max / k) ** self.tax_exponent
        )
        return found

    def channels_worth(self, parameters: float, data: float, gain: float) -> float:
        """The K from which on a doubling gives less than `gain` of the loss of a model trained at that K alone."""
        k = 1.0
        while k < 2.0**20:
            now, twice = self.losses([Observed("", parameters, each, each, data, False) for each in (k, 2 * k)])
            if now - twice < gain * now:
                return k
            k *= 2**0.125
        return k


def _columns(rows: Sequence[Observed]) -> tuple[Array, Array, Array, Array, Array]:
    table = np.array([(r.parameters, r.k, r.k_max, r.data, float(r.elastic)) for r in rows], dtype=np.float64)
    n, k, k_max, d, elastic = table.T
    return n / MILLION, k, k_max, d / TEN_MILLION, elastic


def fit(rows: Sequence[Observed], start: Law | None = None) -> Law:
    """By least squares of relative errors, robust, the best of many starts, or from one.

    Raises:
        UserError: fewer observations than constants.
    """
    if len(rows) < 9:
        raise UserError(f"scaling: {len(rows)} observations; the law has 9 constants, give more runs")
    measured = np.log([row.loss for row in rows])

    def errors(values: Array) -> Array:
        return np.log(_law(values).losses(rows)) - measured

    random = np.random.default_rng(0)
    scale = float(np.exp(measured.min()))
    least = np.array([1e-9, 1e-9, 0.01, 1e-9, 0.01, 1e-9, 0.01, 1e-9, 0.0])
    most = np.array([scale, *[10 * scale, MOST_EXPONENT] * 4])
    if start is not None:
        starts = [np.array(list(asdict(start).values()))]
    else:
        starts = [
            np.array([scale * random.uniform(0.3, 0.95), *(x for _ in range(4) for x in _drawn(random, scale))])
            for _ in range(STARTS)
        ]
    found = [
        least_squares(errors, np.clip(values, least + 1e-12, most - 1e-9), bounds=(least, most), loss="huber",
                      f_scale=ROBUST, x_scale="jac", max_nfev=400)
        for values in starts
    ]  # fmt: skip
    return _law(min(found, key=lambda each: float(each.cost)).x)


def _drawn(random: np.random.Generator, scale: float) -> tuple[float, float]:
    return scale * 10 ** random.uniform(-3, -0.3), random.uniform(0.1, 1.5)


def _law(values: Sequence[float] | Array) -> Law:
    return Law(*(float(value) for value in values))


def resampled(rows: Sequence[Observed], law: Law) -> list[Law]:
    """The law of as many trainings drawn with replacement, often: what another set of runs might have said."""
    names = sorted({row.training for row in rows})
    random = np.random.default_rng(1)
    laws = []
    for _ in range(RESAMPLES):
        drawn = random.choice(names, len(names))
        laws.append(fit([row for name in drawn for row in rows if row.training == name], law))
    return laws


def interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def scaling_arms(config: Config) -> list[Arm]:
    """Elastic models of every shape and time, and smaller ones of one K alone; the largest shape last."""
    elastic = [
        _elastic(config, width, layers, time)
        for width, layers in SHAPES
        for time in BYTES_PER_PARAMETER
        if time * parameters(_shaped(config, width, layers), config.model.num_channels) < MOST_BYTES
    ]
    alone = [_alone(_elastic(config, *shape, ALONE_TIME), k) for shape in SHAPES[:ALONE] for k in config.eval_budgets()]
    return sorted(elastic + alone, key=lambda arm: is_largest(arm.name))


def is_largest(training: str) -> bool:
    """By its name, whether one is among those that the prediction is about."""
    return any(width in training.replace(",", " ").split() for width in LARGEST)


def _elastic(config: Config, d_model: int, n_layers: int, per_parameter: int) -> Arm:
    """The learning rate is the family's up to its width, and falls as 1/width from there."""
    shape, model = _shape(d_model, n_layers), _shaped(config, d_model, n_layers)
    per_update = config.train.batch_sequences * config.model.seq_len
    steps = max(50, round(per_parameter * parameters(model, model.num_channels) / per_update))
    rate = config.optim.lr * min(1.0, config.model.d_model / d_model)
    settings: dict[str, str | int] = {f"model.{name}": value for name, value in shape.items()}
    settings |= {"model.ffn_elastic": "null", "train.steps": steps, "optim.warmup_steps": max(10, steps // 20)}
    overrides = (*(f"{name}={value}" for name, value in settings.items()), f"optim.lr={rate!r}")
    return Arm(f"elastic d={d_model} x {per_parameter}", overrides)


def _shape(d_model: int, n_layers: int) -> dict[str, int]:
    return {"d_model": d_model, "n_layers": n_layers, "mixer_heads": d_model // 16, "d_ffn": d_model * 5 // 2}


def _shaped(config: Config, d_model: int, n_layers: int) -> ModelConfig:
    return config.model.model_copy(update={**_shape(d_model, n_layers), "ffn_elastic": None})


def _alone(arm: Arm, k: int) -> Arm:
    only = ("budget.strategy=fixed", f"budget.budgets=[{k}]", f"eval.budgets=[{k}]", f"model.num_channels={k}")
    return Arm(f"alone {arm.name.split()[1]} K={k}", (*arm.overrides, *only))


def expected(config: Config, seeds: Sequence[int]) -> list[Observed]:
    """The largest shapes' trainings, without losses: what is to be predicted."""
    rows = []
    for arm in (arm for arm in scaling_arms(config) if is_largest(arm.name)):
        own = dict(text.split("=", 1) for text in arm.overrides)
        model = _shaped(config, int(own["model.d_model"]), int(own["model.n_layers"]))
        data = float(own["train.steps"]) * config.train.batch_sequences * config.model.seq_len
        for seed in seeds:
            for k in config.eval_budgets():
                name = f"{arm.name}, seed {seed}"
                rows.append(Observed(name, parameters(model, k), k, model.num_channels, data, elastic=True))
    return rows


def observed(results: Mapping[str, Any]) -> list[Observed]:
    """What the experiment's JSON holds; each seed is a training of its own."""
    base = results["config"]
    per_update = base["train"]["batch_sequences"] * base["model"]["seq_len"]
    rows = []
    for arm, by_seed in results["points"].items():
        own = dict(text.split("=", 1) for text in results["arms"][arm])
        k_max = float(own.get("model.num_channels", base["model"]["num_channels"]))
        data = float(own.get("train.steps", base["train"]["steps"])) * per_update
        for seed, points in zip(results["seeds"], by_seed, strict=True):
            curve = [(x, y) for metric, _, x, y in points if metric == BITS]
            sizes = [x for metric, _, x, _ in points if metric == BITS + BY_SIZE]
            for (k, loss), size in zip(curve, sizes, strict=True):
                name = f"{arm}, seed {seed}"
                rows.append(Observed(name, size, k, k_max, data, arm.startswith("elastic"), loss))
    return rows


def predict(rows: Sequence[Observed], left_out: Sequence[Observed]) -> dict[str, Any]:
    """The law, fitted on `rows`, with its 95% intervals, and what it says of the rows left out."""
    law = fit(rows)
    others = resampled(rows, law)
    every = np.array([other.losses(left_out) for other in others])
    said = [
        {**row._asdict(), "loss": float(loss), "interval": interval(every[:, place].tolist())}
        for place, (row, loss) in enumerate(zip(left_out, law.losses(left_out), strict=True))
    ]
    constants = {
        name: (value, *interval([getattr(other, name) for other in others])) for name, value in asdict(law).items()
    }
    misses = np.abs(law.losses(rows) / [row.loss for row in rows] - 1)
    ladder = {}
    for name, size in (("125m", 125e6), ("1b", 1e9), ("7b", 7e9)):
        worth = [each.channels_worth(size, 20 * size, 1e-3) for each in (law, *others)]
        ladder[name] = (worth[0], *interval(worth[1:]))
    return {
        "law": constants,
        "largest error within, percent": 100 * float(misses.max()),
        "seen": sorted({row.training for row in rows}),
        "channels from which a doubling gives less than 0.1%": ladder,
        "said": said,
    }


def compared(said: Mapping[str, Any], rows: Sequence[Observed]) -> list[dict[str, Any]]:
    """Of every prediction what came; UserError where a run that was to be predicted had been seen."""
    measured = {(row.training, row.k): row.loss for row in rows}
    table = []
    for row in said["said"]:
        if row["training"] in said["seen"]:
            raise UserError(f"prediction: {row['training']} is among the runs that it was fitted on")
        loss = measured.get((row["training"], row["k"]))
        if loss is not None:
            found = {"said": row["loss"], "came": loss, "error %": 100 * (row["loss"] / loss - 1)}
            table.append({"training": row["training"], "K": row["k"], **found})
    if not table:
        raise UserError("prediction: none of the runs that it is about is in the results yet")
    return table


def main() -> None:
    parser = Parser(__doc__ or "", "python -m tools.experiments.scaling docs/results/scaling.json --predict FILE")
    parser.add_argument("results", type=path_argument, help="of the experiment `scaling`")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predict", type=path_argument, metavar="FILE", help="write what the largest will be")
    what.add_argument("--compare", type=path_argument, metavar="FILE", help="a prediction with what came")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8"))
    rows = observed(results)
    if arguments.compare:
        said = json.loads(arguments.compare.read_text(encoding="utf-8"))
        print_table("the largest, as predicted and as it came", compared(said, rows))
        return
    seen = [row for row in rows if not is_largest(row.training)]
    said = predict(seen, expected(Config.model_validate_json(json.dumps(results["config"])), results["seeds"]))
    write_atomically(arguments.predict, (json.dumps(said, indent=1) + "\n").encode())
    constants = said["law"].items()
    print_table(
        "the law", [{"constant": name, "value": v, "low": low, "high": high} for name, (v, low, high) in constants]
    )


if __name__ == "__main__":
    run_tool(main)
