"""Examples of the local tasks in the form they are asked in, from that form or from the fields that the hub has.

The hub's are turned into text as lm_eval does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megassm.errors import UserError

Example = Mapping[str, Any]
TEXTS = frozenset({"query", "goal", "sol1", "sol2"})


class Form(NamedTuple):
    """Fields that an example may have, and what is asked then."""

    fields: tuple[str, ...]
    asked: Callable[[Example], dict[str, Any]]


def _lambada(example: Example) -> dict[str, Any]:
    before, space, last = example["text"].rpartition(" ")
    if not space:
        raise ValueError("text has no last word after a space")
    return {"query": before, "choices": [last]}


def _hellaswag(example: Example) -> dict[str, Any]:
    context = f"{example['ctx_a']} {example['ctx_b'].capitalize()}"
    return {
        "query": _without_markup(f"{example['activity_label']}: {context}"),
        "choices": [_without_markup(ending) for ending in example["endings"]],
        "gold": int(example["label"]),
    }


def _without_markup(text: str) -> str:
    """WikiHow's artefacts left out: lm_eval's expression, but for what it costs where brackets do not close."""
    lines = text.strip().replace(" [title]", ". ").split("\n")
    return "\n".join(map(_without_brackets, lines)).replace("  ", " ")


def _without_brackets(line: str) -> str:
    kept, at = [], 0
    while (opens := line.find("[", at)) >= 0 and (closes := line.find("]", opens)) >= 0:
        kept.append(line[at:opens])
        at = closes + 1
    return "".join((*kept, line[at:]))


def _piqa(example: Example) -> dict[str, Any]:
    return {**{name: example[name] for name in ("goal", "sol1", "sol2")}, "gold": int(example["label"])}


def _arc(example: Example) -> dict[str, Any]:
    return {
        "query": f"Question: {example['question']}\nAnswer:",
        "choices": list(example["choices"]["text"]),
        "gold": list(example["choices"]["label"]).index(example["answerKey"]),
    }


def _asked_already(*fields: str) -> Form:
    return Form(fields, lambda example: {name: example[name] for name in fields})


FORMS: dict[str, tuple[Form, ...]] = {
    "lambada": (_asked_already("query", "choices"), Form(("text",), _lambada)),
    "hellaswag": (
        _asked_already("query", "choices", "gold"),
        Form(("activity_label", "ctx_a", "ctx_b", "endings", "label"), _hellaswag),
    ),
    "piqa": (_asked_already("goal", "sol1", "sol2", "gold"), Form(("goal", "sol1", "sol2", "label"), _piqa)),
    "arc_easy": (
        _asked_already("query", "choices", "gold"),
        Form(("question", "choices", "answerKey"), _arc),
    ),
}
"""By task; the form in which it is asked comes first."""


def as_asked(task: str, example: Any, place: str) -> dict[str, Any]:
    """The fields that the task's templates use.

    Raises:
        UserError: others, or values that make no example; it says which are wanted. `place` is where the example is.
    """
    forms = FORMS[task]
    wanted = ", or ".join(" ".join(form.fields) for form in forms)
    if not isinstance(example, Mapping):
        raise UserError(f"{place}: is no object; {task} wants examples with the fields {wanted}")
    for form in forms:
        if all(name in example for name in form.fields):
            try:
                asked = form.asked(example)
                _check(asked)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                raise UserError(f"{place}: not an example of {task} ({error}); its fields: {wanted}") from None
            return asked
    raise UserError(f"{place}: has the fields {' '.join(map(str, example))}; {task} wants {wanted}")


def _check(asked: Mapping[str, Any]) -> None:
    for name in TEXTS & asked.keys():
        asked[name].encode()  # half of a character, written as \\ud83d, is none
    choices = asked.get("choices", ("", ""))
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise TypeError("choices are not texts")
    "".join(choices).encode()
    gold = asked.get("gold", 0)
    if not isinstance(gold, int) or not 0 <= gold < max(1, len(choices)):
        raise ValueError(f"answer {gold!r} is none of {len(choices)} choices")
