"""Which experiments there are: a question, the arms that answer it, and what is measured on each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from megassm.config.load import load_config
from megassm.config.schema import Config
from tools.experiments.arena import ARENA, arena_arms, arena_settings
from tools.experiments.arms import Arm
from tools.experiments.bases import Basis
from tools.experiments.control import control_points
from tools.experiments.deadline import deadline_points
from tools.experiments.family import family_arms, finalist_arms, position_arms
from tools.experiments.lookup import lookup_arms, lookup_points, lookup_settings
from tools.experiments.measure import Point, cost_points, family_points, journal_points, position_points
from tools.experiments.online import online_points
from tools.experiments.scaling import scaling_arms
from tools.experiments.tiny import (
    ELASTIC,
    FOUR_LAYERS,
    TINY,
    draw_arms,
    layer_arms,
    pattern_arms,
    static_arms,
    text_pattern_arms,
)

TEXT = "configs/experiment.yaml"
FAMILY = "configs/family.yaml"
LOOKUP = "configs/lookup.yaml"
MEASURED_COST = ("model.d_model=256", "model.n_layers=4", "model.seq_len=1024", "model.d_ffn=768")
DECODED = (
    "model.d_model=256", "model.n_layers=3", "model.d_ffn=512", "budget.strategy=log_uniform", "budget.min_k=2",
    "train.batch_sequences=1", "train.micro_batch_sequences=1", "optim.lr=1e-3", "model.seq_len=1024",
)  # fmt: skip
"""Wide enough for a step's time to follow K; 32 filters of 1,024 have a state of 43 numbers, of 256 one of 255."""
LARGE = (
    "model.d_model=176", "model.mixer_heads=11", "model.d_ffn=458", "model.ffn_elastic=null", "train.steps=8100",
    "optim.warmup_steps=400",
)  # fmt: skip
"""Of the family: 0.8M parameters, 41 bytes each."""
CONTROLLER = (
    "model.vocab_size=1", "model.d_model=256", "model.d_ffn=256", "budget.strategy=log_uniform", "budget.min_k=2",
    "train.batch_sequences=4", "train.micro_batch_sequences=4", "optim.lr=1e-3", "model.seq_len=1024",
)  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """What it takes to run one."""

    question: str
    claim: str
    """What the paper (arXiv 2601.22488) says of it."""
    arms: Callable[[Config], Sequence[Arm]]
    measure: Callable[[Path], list[Point]] = journal_points
    """Of a finished run; of a run directory with nothing but a configuration where `trains` is false."""
    config: str = TEXT
    trains: bool = True
    rates: tuple[float, ...] = ()
    """Peak learning rates: each arm is trained at all of them at the first seed, and at the others at its best."""
    x_label: str = "budget K (spectral channels)"
    size: tuple[str, ...] = ()
    """`section.key=value` that make `config` as large as the experiment has it; another file is taken as it is."""
    settings: tuple[str, ...] = ()
    """`section.key=value` that the question is of, with any file."""

    def configuration(self, overrides: Sequence[str] = (), path: Path | None = None) -> Config:
        """Its own, or from another file; `overrides` come last."""
        own = self.size if path is None else ()
        return load_config(path or Path(self.config), (*own, *self.settings, *overrides))


ONE_FOR_ALL = Experiment(
    "Does one elastic training replace a family of models, each trained at its size alone?",
    "One training gives all sizes, each as good as a model of that size.",
    family_arms,
    measure=family_points,
    config=FAMILY,
    rates=(4e-3, 8e-3),
)


def _arms(*arms: Arm) -> Callable[[Config], Sequence[Arm]]:
    return lambda config: arms


def _tiny(question: str, claim: str, arms: Callable[[Config], Sequence[Arm]], *size: str) -> Experiment:
    """On bytes of books, with today's layer, long enough for capacity to matter: a minute or two a training."""
    return Experiment(question, claim, arms, config=FAMILY, size=(*TINY, *size))


def _lookup(name: str, question: str) -> Experiment:
    return Experiment(
        question,
        "Left open: recall.",
        lookup_arms,
        measure=partial(lookup_points, name=name),
        config=LOOKUP,
        rates=(2e-3, 4e-3, 8e-3),
        x_label="budget K, or what the table says",
        settings=lookup_settings(name),
    )


def _arena(name: str) -> Experiment:
    return Experiment(
        ARENA[name].question,
        "Evaluated on Long Range Arena at full size.",
        arena_arms,
        config=LOOKUP,
        rates=(2e-3, 4e-3, 8e-3),
        settings=arena_settings(name),
    )


def _filters(config: str, *settings: str) -> Experiment:
    """Every kind of filters, with their weights and without; the right ones without are what the others are held to."""
    arms = [
        Arm(f"{basis}{', sigma^(1/4)' * (scale != 'none')}", (f"model.sigma_scale={scale}",), basis=basis)
        for scale in ("none", "quarter_power")
        for basis in get_args(Basis)
    ]
    return Experiment(
        "From which K on does it matter which filters there are: right, float32's, random, exponentials, learned?",
        "Published with float32 filters, of which about the first 10 are right.",
        _arms(*arms),
        config=config,
        settings=settings,
    )


EXPERIMENTS = {
    "static_elastic": _tiny(
        "Does budget dropout make a model that can be cut, and what does it cost at full K?",
        "The elastic model degrades smoothly where the static one collapses, and matches it at full K.",
        static_arms,
    ),
    "ablations": _tiny(
        "What do the weights sigma_k^(1/4), the gate and its kind, and the taps give; and the paper's layer?",
        "Without the gate, or without the rescaling of its scores, small budgets lose most.",
        layer_arms,
    ),
    "cost": Experiment(
        "What does a budget cost in prefill, decoding and memory?",
        "Latency and memory fall with K.",
        _arms(
            Arm("spectral (SSSS)"),
            Arm("hybrid (SSSA)", ("model.pattern=SSSA",)),
        ),
        measure=cost_points,
        trains=False,
        size=MEASURED_COST,
    ),
    "high_frequency": Experiment(
        "Do a few smooth channels carry signals of period 2 to 8?",
        "Left open: smooth leading channels may lose high frequencies.",
        _arms(
            ELASTIC,
            Arm("static K=32", ("budget.strategy=fixed",)),
            Arm("elastic, no sigma^(1/4)", ("model.sigma_scale=none",)),
            Arm("elastic hybrid (SA)", ("model.pattern=SA",)),
        ),
        config="configs/tasks/high_frequency.yaml",
    ),
    "signs": Experiment(
        "Do filters with signs carry signals of period 2 to 8 in fewer channels?",
        "Left open: smooth leading channels may lose high frequencies.",
        _arms(
            Arm("plus"),
            Arm("alternating", ("model.basis=alternating",)),
            Arm("hankel_l", ("model.basis=hankel_l",)),
        ),
        config="configs/tasks/high_frequency.yaml",
        settings=("model.sigma_scale=none",),
    ),
    "sampling": _tiny(
        "Which budgets should training draw, and does teaching from full K help?",
        "Left open: the sampling strategy.",
        draw_arms,
    ),
    "hybrids": _tiny(
        "What does attention among spectral layers give at equal parameters, over K?",
        "Left open: hybrids.",
        text_pattern_arms,
        FOUR_LAYERS,
    ),
    "hybrids_recall": Experiment(
        "... and on associative recall?",
        "Left open: hybrids.",
        pattern_arms,
        config="configs/tasks/recall.yaml",
    ),
    "online": replace(
        _tiny(
            "Does choosing K token by token, by how uncertain the model is, beat one K for all?",
            "Left open: online budgets.",
            _arms(ELASTIC),
        ),
        measure=online_points,
        x_label="average K",
    ),
    "deadline": Experiment(
        "Does K by the load keep deadlines in a burst that full K cannot serve, and at what price in quality?",
        "Left open: online budgets.",
        _arms(Arm("elastic, d=256")),
        measure=deadline_points,
        x_label="arrivals in the burst over what full K serves",
        size=DECODED,
    ),
    "control": Experiment(
        "Does K by the time there is keep a controller's deadlines, and its return?",
        "Left open: online, closed-loop budgets.",
        _arms(Arm("controller")),
        measure=control_points,
        trains=False,
        x_label="mean compute of a step over full K's",
        size=CONTROLLER,
    ),
    "family": ONE_FOR_ALL,
    "family_large": replace(ONE_FOR_ALL, question="... and at four times the size?", arms=finalist_arms, size=LARGE),
    "family_cost": Experiment(
        "What do the members of the family cost in prefill, decoding and memory?",
        "Latency and memory fall with K.",
        lambda config: [arm for arm in family_arms(config) if arm.peer is None],
        measure=cost_points,
        config=FAMILY,
        trains=False,
    ),
    "position": Experiment(
        "Up to 16 times the trained length, how good is a model at each position, over K, read in either way?",
        "Left open: length generalisation.",
        position_arms,
        measure=partial(position_points, factor=16),
        config=FAMILY,
        x_label="end of the positions over the trained length",
    ),
    "recall": _lookup("recall", "How many pairs are looked up, over how many ids that mean nothing, over K?"),
    "needle": _lookup("needle", "Is one pair, or one of four, found in a haystack of the trained length, over K?"),
    "tracking": _lookup("tracking", "Are values followed along chains of variables, over K?"),
    "frequent": _lookup("frequent", "Is the most frequent word known, over K?"),
    "filters_text": _filters(FAMILY, "model.ffn_elastic=null", "model.input_taps=1"),
    "filters_recall": _filters(LOOKUP, *lookup_settings("recall"), "model.input_taps=1"),
    "filters_high_frequency": _filters("configs/tasks/high_frequency.yaml"),
    **{name: _arena(name) for name in ARENA},
    "scaling": Experiment(
        "What does a model of N parameters and K channels reach after D bytes, and what does elasticity cost it?",
        "Left open: a scaling law.",
        scaling_arms,
        measure=family_points,
        config=FAMILY,
    ),
}
