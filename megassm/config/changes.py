"""What of a configuration may change where a run continues, and what each change does."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from megassm.config.schema import Config
from megassm.config.source import show

Effect = Literal["refused", "data", "rate", "update", "form", "record", "start"]

MEANINGS: dict[Effect, str] = {
    "refused": "an error: it would be another run",
    "data": "an error, unless the data are the same (their fingerprint is)",
    "rate": "holds from the next update on; the learning rate, a function of the step, is computed anew",
    "update": "holds from the next update on",
    "form": "holds from now on: how it is computed; the training is the same to rounding",
    "record": "holds from now on: what is watched, told and kept; no weight is another for it",
    "start": "ignored: it only says how a run begins",
}

_EFFECTS: dict[str, Effect] = {
    "run.seed": "refused",
    "run.init_from": "start",
    "run.dir": "record",
    "model.*": "refused",
    "model.filterbank": "form",
    "model.beyond": "record",
    "model.channel_init_std": "start",
    "model.embed_init_std": "start",
    "model.gate_bias_init": "start",
    "model.gate_init_scale": "start",
    "budget.*": "update",
    "optim.*": "update",
    "optim.lr": "rate",
    "optim.min_lr_ratio": "rate",
    "optim.schedule": "rate",
    "optim.warmup_steps": "rate",
    "optim.decay_steps": "rate",
    "train.steps": "rate",
    "train.batch_sequences": "refused",
    "train.precision": "refused",
    "train.max_skipped": "update",
    "train.micro_batch_sequences": "form",
    "train.recompute": "form",
    "train.compile": "form",
    "train.device": "form",
    "parallel.*": "form",
    "data.path": "data",
    "data.sources": "data",
    "data.phases": "data",
    "data.tokenizer": "data",
    "data.isolate_documents": "refused",
    "data.on_bad_block": "update",
    "data.max_epochs": "record",
    "data.on_repeats": "record",
    "data.cache_dir": "form",
    "data.cache_gib": "form",
    "checkpoint.*": "record",
    "health.*": "record",
    "health.spike_z": "update",
    "health.spike_action": "update",
    "eval.*": "record",
    "log.*": "record",
}
"""By knob; a knob that is not named has its section's."""


class Change(NamedTuple):
    """A knob that is not what it was."""

    knob: str
    before: Any
    now: Any

    def __str__(self) -> str:
        ignored = " (ignored: only a run's beginning uses it)" if effect_of(self.knob) == "start" else ""
        return f"{self.knob} {_written(self.before)} -> {_written(self.now)}{ignored}"


def effect_of(knob: str) -> Effect:
    """What changing a knob does to a run that continues.

    Raises:
        KeyError: nobody has said so yet: a new knob, or section, belongs into `_EFFECTS`.
    """
    name = ".".join(knob.split(".")[:2])
    return _EFFECTS[name] if name in _EFFECTS else _EFFECTS[f"{name.partition('.')[0]}.*"]


def knobs_of(config: Config) -> dict[str, Any]:
    """Every `section.key` with its value as it is written down, without secrets."""
    sections: dict[str, dict[str, Any]] = config.model_dump(mode="json")
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def changes(before: Config, now: Config) -> list[Change]:
    """Every knob whose value is another, in the order of the schema."""
    old = knobs_of(before)
    return [Change(knob, old[knob], value) for knob, value in knobs_of(now).items() if old[knob] != value]


def fixed_knobs(config: Config) -> dict[str, Any]:
    """Those that a run keeps from its beginning to its end."""
    return {knob: value for knob, value in knobs_of(config).items() if effect_of(knob) == "refused"}


def _written(value: Any) -> str:
    text = show(tuple(value) if isinstance(value, list) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
