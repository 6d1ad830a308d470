"""How a generated answer is written, and read back: a grammar for the LLM (Lark, as llguidance reads it), and a parser.

    items     word; word; word                or none
    pairs     label = value; label = value    or none
    number    12.5                            or none
    object    {"amount":12.5,"urgent":null}   JSON, null where nothing is said of a property

Texts and digits are bounded and there is no free white space, so nothing can go on for ever.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from svbatch.tasks.definition import Property
from svbatch.tasks.task import Task

NONE = "none"
_COMPACT = {"x-guidance": {"whitespace_flexible": False}}
MAX_ITEMS = 10
MAX_CHARS = 60
LARGEST = 10**15 - 1  # of a number without a bound; all whole ones up to it are exact as float64 too
FINEST = 1e-6  # step of numbers that are not whole
ANY_WHOLE, ANY_NUMBER = r"-?(0|[1-9][0-9]{0,14})", r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,6})?"


@dataclass(frozen=True)
class Said:
    """A generated text: for each of its N tokens where it ends in the text, and its log-probability (natural)."""

    text: str
    ends: Sequence[int]
    logprobs: Sequence[float]

    def score(self, start: int, end: int) -> float:
        """The mean token log-probability of text[start:end], as exp: between 0 and 1, not a probability."""
        starts = [0, *self.ends[:-1]]
        own = [p for p, a, b in zip(self.logprobs, starts, self.ends, strict=True) if a < end and b > start]
        return math.exp(sum(own) / len(own)) if own else 1.0


def grammar_of(task: Task) -> str | None:
    """The grammar of a task's answers; None where any text is one."""
    match task.answer:
        case "items":
            return _listed("item", task, f"item: {_text(task)}")
        case "pairs":
            names = " | ".join(json.dumps(name) for name in task.label_names)
            return _listed("pair", task, f'pair: ({names}) " = " value\nvalue: {_text(task)}')
        case "number":
            return f'start: "{NONE}" | number\nnumber: {_number(task)}'
        case "object":
            return f"start: %json {json.dumps(_object_schema(task.properties) | _COMPACT)}"
        case _:
            return None


def spelled(task: Task) -> str:
    """What the answers of a task are spelled with, whatever is said: its labels and the marks of its grammar."""
    marks = {"items": f"{NONE};", "pairs": f"{NONE};=", "number": f"{NONE}-.0123456789"}
    schema = json.dumps(_object_schema(task.properties), ensure_ascii=False) if task.properties else ""
    return " ".join([*task.scored, *task.label_names, marks.get(task.answer, ""), schema]).strip()


def parse_items(said: Said) -> list[tuple[str, float]]:
    """(item, score) of each, as they come, none twice."""
    found: dict[str, float] = {}
    for start, end in _spans(said.text):
        found.setdefault(said.text[start:end], said.score(start, end))
    return list(found.items())


def parse_pairs(said: Said) -> list[tuple[str, str, float]]:
    """(label, value, score) of each, as they come, none twice; the score is the value's."""
    found: dict[tuple[str, str], float] = {}
    for start, end in _spans(said.text):
        name, _, value = said.text[start:end].partition(" = ")
        found.setdefault((name, value), said.score(end - len(value), end))
    return [(name, value, score) for (name, value), score in found.items()]


def parse_number(said: Said) -> tuple[float | int | None, float]:
    """(number, score); None where none is said."""
    value = None if said.text == NONE else json.loads(said.text)
    return value, said.score(0, len(said.text))


def parse_object(said: Said) -> tuple[dict[str, Any], float]:
    """(object, score)."""
    return json.loads(said.text), said.score(0, len(said.text))


def _listed(name: str, task: Task, rules: str) -> str:
    more = (task.limits.max_items or MAX_ITEMS) - 1
    return f'start: "{NONE}" | {name} ("; " {name}){{0,{more}}}\n{rules}'


def _text(task: Task) -> str:
    """A text that neither begins nor ends with a space, and holds no separator."""
    longest = task.limits.max_chars or MAX_CHARS
    return r"/[^;=\s]/" if longest == 1 else rf"/[^;=\s]([^;=\n\r\t]{{0,{longest - 2}}}[^;=\s])?/"


def _number(task: Task) -> str:
    limits = task.limits
    if limits.minimum is None and limits.maximum is None:
        return f"/{ANY_WHOLE if limits.whole else ANY_NUMBER}/"
    bounds = {
        "minimum": -LARGEST if limits.minimum is None else limits.minimum,
        "maximum": LARGEST if limits.maximum is None else limits.maximum,
    }
    kind = {"type": "integer"} if limits.whole else {"type": "number", "multipleOf": FINEST}
    return f"%json {json.dumps(kind | bounds | _COMPACT)}"


def _object_schema(properties: Mapping[str, Property]) -> dict[str, Any]:
    schemas = {name: _nullable(_schema(prop)) for name, prop in properties.items()}
    return {"type": "object", "properties": schemas, "required": list(schemas), "additionalProperties": False}


def _schema(prop: Property) -> dict[str, Any]:
    match prop.type:
        case "string" if prop.enum:
            return {"enum": list(prop.enum)}
        case "string":
            return {"type": "string", "minLength": 1, "maxLength": MAX_CHARS}
        case "array":
            assert prop.items is not None, "a definition gives every array its items"
            return {"type": "array", "items": _schema(prop.items), "maxItems": MAX_ITEMS}
        case "object":
            return _object_schema(prop.properties)
        case "integer":
            return {"type": "integer", "minimum": -LARGEST, "maximum": LARGEST}
        case "number":
            return {"type": "number", "minimum": -LARGEST, "maximum": LARGEST, "multipleOf": FINEST}
        case _:
            return {"type": prop.type}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each part between separators; none of the word for nothing."""
    if text == NONE:
        return []
    spans = []
    start = 0
    for part in text.split("; "):
        spans.append((start, start + len(part)))
        start += len(part) + 2
    return spans
