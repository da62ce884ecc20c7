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
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megassm.cli.arguments import refuse
from megassm.config.fields import Section
from megassm.config.rules import violations
from megassm.config.schema import Config
from megassm.errors import redacted

Tree = dict[str, Any]


class ConfigError(ValueError):
    """All mistakes of a configuration; `str()` has one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass
class _Source:
    """Values as nested dicts, where each stands, and what was wrong already while reading."""

    values: Tree = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    mistakes: list[tuple[str, str]] = field(default_factory=list)

    def place(self, knob: str) -> str:
        """Where a knob stands; for one that is not written down, where its section does."""
        while knob and knob not in self.places:
            knob = knob.rpartition(".")[0]
        return self.places.get(knob, "")


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
    source = _read_yaml(path)
    for override in overrides:
        _apply_override(source, override)
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


def _read_yaml(path: Path) -> _Source:
    source = _Source()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; --config takes a YAML file, such as configs/tiny.yaml"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}; --config takes a YAML file"]) from None
    try:
        root = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}: not YAML: {error.problem or error.context}"]) from None
    except YAMLError as error:
        raise ConfigError([f"{path}:1: not YAML: {' '.join(str(error).split())}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}:1: nested too deeply; a configuration has sections and keys"]) from None
    source.places[""] = f"{path}:1"
    if root is None:
        return source
    if not isinstance(root, MappingNode):
        raise ConfigError([f"{path}:1: must be a mapping of sections such as 'model:' and 'train:'"])
    try:
        source.values = _mapping(root, "", str(path), source)
    except RecursionError:
        raise ConfigError([f"{path}:1: nested too deeply, or an alias of itself; write the values out"]) from None
    return source


def _mapping(node: MappingNode, prefix: str, file: str, source: _Source) -> Tree:
    values: Tree = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        knob = f"{prefix}{key}"
        place = f"{file}:{key_node.start_mark.line + 1}"
        if key in values:
            first = source.places[knob].rpartition(":")[2]
            source.mistakes.append((place, f"key {knob!r} stands twice, first in line {first}; keep one of them"))
            continue
        source.places[knob] = place
        values[key] = _value(value_node, f"{knob}.", file, source)
    return values


def _value(node: Node, prefix: str, file: str, source: _Source) -> Any:
    match node:
        case MappingNode():
            return _mapping(node, prefix, file, source)
        case SequenceNode():
            return tuple(_value(item, f"{prefix}{number}.", file, source) for number, item in enumerate(node.value))
        case ScalarNode():
            return _scalar(node)
    raise AssertionError(f"unexpected YAML node {node!r}")


def _scalar(node: ScalarNode) -> Any:
    constructor = YAML(typ="safe", pure=True).constructor
    try:
        return constructor.construct_object(node)
    except (YAMLError, ValueError):  # an unknown tag, a number out of range: let the type check name it
        return node.value


def _apply_override(source: _Source, override: str) -> None:
    place = f"command line {redacted(override)!r}"
    knob, equals, text = override.partition("=")
    if not equals or "." not in knob or not all(knob.split(".")):
        source.mistakes.append((place, "an override is section.key=value, such as train.steps=100"))
        return
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except YAMLError:
        source.mistakes.append((place, f"{text!r} is not a YAML value"))
        return
    value = None if node is None else _value(node, f"{knob}.", place, source)
    *sections, key = _keys(knob)
    values, prefix = source.values, ""
    for section in sections:
        prefix += section
        if values.get(section) is None:
            values[section] = {}
            source.places.setdefault(prefix, place)
        values, prefix = values[section], f"{prefix}."
        if not isinstance(values, dict):
            return  # the section itself is wrong in the file; that is reported there
    values[key] = value
    source.places[knob] = place


def _keys(knob: str) -> list[str]:
    """The sections that lead to a knob, and its key; a name in a mapping such as data.sources may have dots."""
    section, dot, rest = knob.partition(".")
    keys, kind = [section], Config.model_fields.get(section)
    while dot and kind is not None and (inner := _section(kind.annotation)) is not None:
        name, dot, others = rest.partition(".")
        kind = inner.model_fields.get(name)
        if not dot or kind is None or (_section(kind.annotation) is None and get_origin(kind.annotation) is not dict):
            break
        keys, rest = [*keys, name], others
    return [*keys, rest]


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field is, one that may be null included."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def _build(source: _Source) -> tuple[Config, set[str]]:
    """The configuration with stand-ins for its ill-formed knobs, and the names of those.

    Building what can be built lets the rules that span knobs be reported together with the simple mistakes;
    a rule that involves a stand-in is not judged.
    """
    try:
        return Config.model_validate(source.values), set()
    except ValidationError as error:
        bad: set[str] = set()
        for problem in error.errors():
            knob = re.sub(r"(\.\d+)+$", "", ".".join(map(str, problem["loc"])))  # an item of a list: the list
            if knob not in bad:
                bad.update((knob, ".".join(knob.split(".")[:2])))  # the knob itself, and where in it
                _report(source, knob, problem)
    bad.update(knob for knob in _knobs(Config) if knob.partition(".")[0] in bad)
    return Config.model_validate(_repaired(Config, source.values, bad)), bad


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


def _report(source: _Source, knob: str, problem: Mapping[str, Any]) -> None:
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


def _mistake(source: _Source, knob: str, rule: str, value: object) -> None:
    source.mistakes.append((source.place(knob), f"{knob} = {_show(value)}: must be {rule}"))


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
    known = list(_knobs(Config))
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
        if (section := _section(info.annotation)) is not None:
            yield from _knobs(section, f"{prefix}{name}.")


def _lookup(config: Config, knob: str) -> object:
    value: object = config
    for part in knob.split("."):
        value = getattr(value, part)
    return value


def _show(value: object) -> str:
    match value:
        case tuple():
            return f"[{', '.join(_show(item) for item in value)}]"
        case None:
            return "null"
        case dict():
            return f"{{{', '.join(f'{name}: {_show(item)}' for name, item in value.items())}}}"
        case BaseModel():
            return _show(value.model_dump(mode="json"))
        case str():
            return repr(redacted(value))
        case bool():
            return str(value).lower()
        case _:
            return repr(value)


def _in_file_order(mistakes: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    def line(mistake: tuple[str, str]) -> tuple[int, int]:
        number = mistake[0].rpartition(":")[2]
        return (0, int(number)) if number.isdigit() else (1, 0)

    return sorted(mistakes, key=line)
