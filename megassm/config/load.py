"""YAML and `section.key=value` -> `Config`, or every mistake at once, each with its place.

A message names the place, the value, the rule and, for a key, the nearest name:

    configs/1b.yaml:14: no key 'model.n_layer'; did you mean 'model.n_layers'?
    configs/1b.yaml:15: model.d_model = 1000: must be divisible by model.n_heads = 16
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from megassm.cli.arguments import refuse
from megassm.config.rules import violations
from megassm.config.schema import Config
from megassm.config.source import (
    ConfigError,
    Source,
    Tree,
    apply_override,
    read_yaml,
    section_of,
    show,
    take_preset,
)


def world_size_from_environment() -> int:
    """How many ranks the launcher (deepspeed, torchrun) started; 1 without one."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(
            [f"environment: WORLD_SIZE = {text!r}: must be a whole number of at least 1; launchers set it"]
        )
    return int(text)


def load_config_or_exit(path: Path, overrides: Sequence[str], world_size: int | None = None) -> Config:
    """`load_config` for an entry point: mistakes are printed by rank 0 and all ranks leave with code 2.

    Without `world_size` it is the launcher's.
    """
    try:
        return load_config(path, overrides, world_size or world_size_from_environment())
    except ConfigError as error:
        count = len(error.mistakes)
        refuse(f"{error}\n{count} mistake{'s' * (count > 1)} in the configuration; nothing was started", 2)


def load_config(path: Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Reads and checks a run's configuration for `world_size` ranks.

    Args:
        path: YAML file with the sections of `Config`.
        overrides: `section.key=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: with every mistake, in the order of the file.
    """
    source = read_yaml(path)
    take_preset(source)
    for override in overrides:
        apply_override(source, override)
    config, bad_knobs = _build(source)
    for violation in violations(config, world_size):
        if not bad_knobs.intersection(violation.knobs):
            knob = violation.knobs[0]
            _mistake(source, knob, violation.rule, _lookup(config, knob))
    if source.mistakes:
        raise ConfigError([f"{place}: {text}" for place, text in _in_file_order(source.mistakes)])
    return config


def dump_config(config: Config) -> str:
    """YAML of the resolved configuration; valid as `--config` itself."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), text)
    return "# Resolved configuration of a run: every knob with its value. Usable as --config.\n" + text.getvalue()


def _build(source: Source) -> tuple[Config, set[str]]:
    """The configuration with stand-ins for its ill-formed knobs, and the names of those.

    Building what can be built lets the rules that span knobs be reported together with the simple mistakes;
    a rule that involves a stand-in is not judged.
    """
    bad: set[str] = set()
    values = source.values
    while True:  # a name that is no UTF-8 hides the mistakes beside it from the first round
        try:
            return Config.model_validate(values), bad
        except ValidationError as error:
            known = len(bad)
            for problem in error.errors():
                knob = re.sub(r"(\.\d+)+$", "", ".".join(map(str, problem["loc"])))  # an item of a list: the list
                if knob not in bad:
                    bad.update((knob, ".".join(knob.split(".")[:2])))  # the knob itself, and where in it
                    _report(source, knob, problem)
            assert len(bad) > known, "stand-ins are well formed"
        bad.update(knob for knob in _knobs(Config) if knob.partition(".")[0] in bad)
        values = _repaired(Config, source.values, bad)


def _repaired(model: type[BaseModel], values: Tree, bad: set[str], prefix: str = "") -> Tree:
    """`values` without the knobs in `bad`; required ones get a stand-in of the right type."""
    repaired: Tree = {}
    for name, info in model.model_fields.items():
        knob, kind = f"{prefix}{name}", info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            section = values.get(name, {}) if knob not in bad else {}
            repaired[name] = _repaired(kind, section, bad, f"{knob}.")
        elif name in values and knob not in bad:
            repaired[name] = values[name]
        elif info.is_required():
            repaired[name] = "-" if kind is str else 1
    return repaired


def _report(source: Source, knob: str, problem: Mapping[str, Any]) -> None:
    match problem["type"]:
        case "extra_forbidden":
            source.mistakes.append((source.place(knob), f"no key {knob!r}{_nearest(knob)}"))
        case "missing":
            _, _, key = knob.rpartition(".")
            what = f"section {key!r}" if "." not in knob else f"key {knob!r}"
            source.mistakes.append((source.place(knob), f"{what} is missing; it has no default"))
        case "model_type" | "model_attributes_type":
            source.mistakes.append((source.place(knob), f"{knob} must be a section: 'key: value' lines below it"))
        case _:
            _mistake(source, knob, _rule(problem), problem["input"])


def _mistake(source: Source, knob: str, rule: str, value: object) -> None:
    source.mistakes.append((source.place(knob), f"{knob} = {show(value)}: must be {rule}"))


def _rule(problem: Mapping[str, Any]) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type":
            return "a number"
        case "bool_type":
            return "true or false"
        case "string_type":
            return "text"
        case "tuple_type":
            return "a list, such as [2, 4, 8]"
        case "literal_error":
            return f"one of {context['expected']}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"greater than {context['gt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "multiple_of":
            return f"a multiple of {context['multiple_of']}"
        case "string_pattern_mismatch":
            return f"text of the form {context['pattern']}"
        case _:
            message: str = problem["msg"]
            return f"valid: {message[0].lower()}{message[1:]}"


def _nearest(knob: str) -> str:
    known = ["preset", *_knobs(Config)]
    section, _, key = knob.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == section]
    keys = {name.rpartition(".")[2]: name for name in siblings}
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {keys[close[0]]!r}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == key and name != knob]
    if elsewhere:
        return f"; did you mean {elsewhere[0]!r}?"
    return f"; {section or 'the top level'} has {', '.join(sorted(keys))}" if keys else ""


def _knobs(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        if (section := section_of(info.annotation)) is not None:
            yield from _knobs(section, f"{prefix}{name}.")


def _lookup(config: Config, knob: str) -> object:
    value: object = config
    for part in knob.split("."):
        value = getattr(value, part)
    return value


def _in_file_order(mistakes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    def line(mistake: tuple[str, str]) -> tuple[int, int]:
        number = mistake[0].rpartition(":")[2]
        return (0, int(number)) if number.isdigit() else (1, 0)

    return sorted(mistakes, key=line)
