"""docs/configuration.md: every knob with type, default, range and meaning, from the schema itself.

Which other knobs a knob is checked with is taken from the source of `megassm.config.rules`, where the rules themselves
are.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megassm.config import rules
from megassm.config.changes import MEANINGS, effect_of
from megassm.config.schema import Config

Schema = Mapping[str, Any]

HEADER = """\
# Configuration

Written by `tools/config_reference.py` from the schema, [megassm/config](../megassm/config); a test compares both.

A run is one YAML file with these sections, such as those in [configs/](../configs). What it leaves out has the default.
`section.key=value` on the command line overrides it, the value in YAML: `train.steps=100`, `budget.budgets=[2,4,8]`.
An unknown key, a value of another type or out of range, and a broken rule are errors, all reported at once with file
and line. `python launch/pretrain.py --config configs/tiny.yaml --print-config` prints a configuration as resolved.

*Continuing* says what another value does to a run that continues ([resuming.md](resuming.md) shows what it then says):

{continuing}

*Checked with* names the knobs that a rule compares a knob with ([rules.py](../megassm/config/rules.py)); what breaks
a rule is explained when it does. *required* has no default.
""".format(continuing="\n".join(f"* {effect}: {meaning}" for effect, meaning in MEANINGS.items()))
KNOB = re.compile(r"[a-z]+\.[a-z_0-9]+")
KINDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "object": "mapping"}


def reference() -> str:
    """The page, Markdown."""
    schema = Config.model_json_schema()
    related = related_knobs()
    parts = [HEADER]
    for name, field in Config.model_fields.items():
        section = _section_of(field)
        parts += [f"## {name}\n", f"{_line(inspect.getdoc(section) or '')}\n"]
        parts += ["| knob | type | default | meaning | continuing | checked with |", "|---|---|---|---|---|---|"]
        parts += [*_rows(name, section, schema, related), ""]
    return "\n".join(parts)


def related_knobs() -> dict[str, list[str]]:
    """By knob, the others that a rule names together with it; of `megassm.config.rules`, read as source."""
    related: dict[str, set[str]] = defaultdict(set)
    for node in ast.walk(ast.parse(inspect.getsource(rules))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Violation" and node.args:
            names = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            knobs = {name for name in names if isinstance(name, str) and KNOB.fullmatch(name)}
            for knob in knobs:
                related[knob] |= knobs - {knob}
    return {knob: sorted(others) for knob, others in related.items()}


def _section_of(field: FieldInfo) -> type[BaseModel]:
    annotation = field.annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def _rows(prefix: str, section: type[BaseModel], schema: Schema, related: Mapping[str, list[str]]) -> Iterator[str]:
    properties = schema["$defs"][section.__name__]["properties"]
    for name, field in section.model_fields.items():
        knob = f"{prefix}.{name}"
        with_knobs = ", ".join(f"`{other}`" for other in related.get(knob, []))
        default = "*required*" if field.is_required() else f"`{_yaml(field.default)}`"
        kind = _kind(properties[name], schema)
        yield f"| `{knob}` | {kind} | {default} | {_line(field.description or '')} | {effect_of(knob)} | {with_knobs} |"
        for inner in _inner_sections(field.annotation):
            yield from _rows(knob, inner, schema, related)


def _inner_sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections inside a knob's value, such as those of model.ffn_elastic."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _inner_sections(part)


def _kind(found: Schema, schema: Schema) -> str:
    """A type with its range, in words."""
    if "$ref" in found:
        return "mapping, below"
    if "anyOf" in found:
        return " or ".join(_kind(part, schema) for part in found["anyOf"])
    if "enum" in found or "const" in found:
        return ", ".join(f"`{_yaml(value)}`" for value in found.get("enum", [found.get("const")]))
    if found.get("type") == "null":
        return "`null`"
    if found.get("type") == "array":
        return f"list of: {_kind(found.get('items', {}), schema)}"
    if found.get("type") == "object":
        inside = found.get("additionalProperties")
        return f"mapping of name to {_kind(inside, schema)}" if isinstance(inside, Mapping) else "mapping"
    return " ".join([KINDS.get(found.get("type", ""), "any"), *_range(found)])


def _range(found: Schema) -> Iterator[str]:
    low, above, high = found.get("minimum"), found.get("exclusiveMinimum"), found.get("maximum")
    if low is not None and high is not None:
        yield f"from {_number(low)} to {_number(high)}"
    elif low is not None:
        yield f"≥ {_number(low)}"
    elif above is not None:
        yield f"> {_number(above)}"
    elif high is not None:
        yield f"≤ {_number(high)}"
    if "multipleOf" in found:
        yield f"multiple of {found['multipleOf']}"
    if found.get("minLength"):
        yield "not empty"
    if "pattern" in found:
        yield f"like `{found['pattern']}`"


def _number(value: float) -> str:
    """As people write it: 2^24, 10,000, 0.1."""
    whole = int(value)
    if whole == value and whole >= 2**16 and whole.bit_count() == 1:
        return f"2^{whole.bit_length() - 1}"
    return f"{whole:,}" if whole == value else f"{value:g}"


def _yaml(value: object) -> str:
    """A default as a file has it."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return _yaml(value[0]) if len(value) == 1 else f"[{', '.join(map(_yaml, value))}]"
        case float():
            return f"{value:g}"
        case dict():
            return "{}" if not value else str(value)
        case _:
            return str(value)


def _line(text: str) -> str:
    """On one line of a table."""
    return " ".join(text.split()).replace("|", "\\|")
