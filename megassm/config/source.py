"""A configuration as it is written down, in YAML and `section.key=value`: every value with its place, none judged.

`megassm.config.presets` says what `preset: paper` means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megassm.config.fields import Section
from megassm.config.presets import PRESETS
from megassm.config.schema import Config
from megassm.errors import UserError, redacted
from megassm.guarded import YAML_BYTES, compose_yaml, read_bytes

Tree = dict[str, Any]


class ConfigError(ValueError):
    """All mistakes of a configuration; `str()` has one line each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


@dataclass
class Source:
    """Values as nested dicts, where each stands, and what was wrong already while reading."""

    values: Tree = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    mistakes: list[tuple[str, str]] = field(default_factory=list)

    def place(self, knob: str) -> str:
        """Where a knob stands; for one that is not written down, where its section does."""
        while knob and knob not in self.places:
            knob = knob.rpartition(".")[0]
        return self.places.get(knob, "")


def _by_name(path: Path) -> Path:
    """A configuration of the project's by its name alone, such as tiny or tasks/recall, where no such file is here."""
    if path.suffix or path.is_absolute() or path.exists():
        return path
    package = Path(__file__).parents[1]
    found = (folder / f"{path}.yaml" for folder in (package / "configs", package.parent / "configs"))
    return next((file for file in found if file.is_file()), path)


def read_yaml(path: Path) -> Source:
    source = Source()
    try:
        text = read_bytes(_by_name(path), YAML_BYTES, "a configuration has sections and keys").decode()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file; --config takes a YAML file, such as configs/tiny.yaml"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    except UserError as error:
        raise ConfigError([f"{error}; --config takes a YAML file"]) from None
    try:
        root = compose_yaml(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{path}:{line}: not YAML: {error.problem or error.context}"]) from None
    except YAMLError as error:
        raise ConfigError([f"{path}:1: not YAML: {' '.join(str(error).split())}"]) from None
    except ValueError as error:
        raise ConfigError([f"{path}:1: {error}; a configuration has sections and keys"]) from None
    source.places[""] = f"{path}:1"
    if root is None:
        return source
    if not isinstance(root, MappingNode):
        raise ConfigError([f"{path}:1: must be a mapping of sections such as 'model:' and 'train:'"])
    source.values = _mapping(root, "", str(path), source)
    return source


def _mapping(node: MappingNode, prefix: str, file: str, source: Source) -> Tree:
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


def _value(node: Node, prefix: str, file: str, source: Source) -> Any:
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
        value = constructor.construct_object(node)
    except Exception:  # an unknown tag, or one of another type: let the type check name it
        return node.value
    return node.value if isinstance(value, int) and abs(value) >= 2**63 else value


def apply_override(source: Source, override: str) -> None:
    place = f"command line {redacted(override)!r}"
    knob, equals, text = override.partition("=")
    if not knob.isascii():
        source.mistakes.append((place, "the names of sections and knobs are ASCII; type it again"))
        return
    if knob == "preset" and equals:
        for preset_knob, value in _preset(source, text, place):
            _set(source, preset_knob, value, place)
        return
    if not equals or "." not in knob or not all(knob.split(".")):
        meant = [f"{section}.{knob}" for section, field in Config.model_fields.items()
                 if (inner := section_of(field.annotation)) is not None and knob in inner.model_fields]  # fmt: skip
        hint = f"; did you mean {' or '.join(f'{name}={text}' for name in meant)}?" if equals and meant else ""
        source.mistakes.append((place, f"an override is section.key=value, such as train.steps=100{redacted(hint)}"))
        return
    try:
        node = compose_yaml(text)
    except (YAMLError, ValueError):
        source.mistakes.append((place, f"{redacted(text)[:100]!r} is not a YAML value"))
        return
    _set(source, knob, None if node is None else _value(node, f"{knob}.", place, source), place)


def _set(source: Source, knob: str, value: Any, place: str) -> None:
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


def take_preset(source: Source) -> None:
    """Replaces the file's key `preset` by those of the preset's knobs that the file does not have."""
    if "preset" not in source.values:
        return
    place = source.places["preset"]
    for knob, value in _preset(source, source.values.pop("preset"), place):
        if knob not in source.places:
            _set(source, knob, value, place)


def _preset(source: Source, name: object, place: str) -> list[tuple[str, Any]]:
    """(knob, value) of every knob of a preset."""
    if not isinstance(name, str) or name not in PRESETS:
        known = " or ".join(map(repr, PRESETS))
        source.mistakes.append((place, f"preset = {show(name)}: must be {known}, or left out"))
        return []
    return [(f"{section}.{key}", value) for section, knobs in PRESETS[name].items() for key, value in knobs.items()]


def _keys(knob: str) -> list[str]:
    """The sections that lead to a knob, and its key; a name in a mapping such as data.sources may have dots."""
    section, dot, rest = knob.partition(".")
    keys, kind = [section], Config.model_fields.get(section)
    while dot and kind is not None and (inner := section_of(kind.annotation)) is not None:
        name, dot, others = rest.partition(".")
        kind = inner.model_fields.get(name)
        if not dot or kind is None or (section_of(kind.annotation) is None and get_origin(kind.annotation) is not dict):
            break
        keys, rest = [*keys, name], others
    return [*keys, rest]


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field is, one that may be null included."""
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


def show(value: object) -> str:
    match value:
        case tuple():
            return f"[{', '.join(show(item) for item in value)}]"
        case None:
            return "null"
        case dict():
            return f"{{{', '.join(f'{name}: {show(item)}' for name, item in value.items())}}}"
        case BaseModel():
            return show(value.model_dump(mode="json"))
        case str():
            return repr(redacted(value))
        case bool():
            return str(value).lower()
        case _:
            return repr(value)
