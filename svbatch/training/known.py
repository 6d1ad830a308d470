"""What a manifest's labels say are the true answers of a library task.

    any task of answer type label    its name, such as `emotion`: one of the task's labels; `lang` serves for language
    intent, slots                    labels of the manifest's own are asked where any is none of the library's
    slots                            {"slot": "value", …}
    keywords                         ["word", …]; an empty list is an answer too
    translation                      {"German": "…"}
    question                         {"What is asked?": "answer", …}

Of another kind of manifest, whose metadata are text, the last four are JSON in that text.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from svbatch.errors import TaskError, TrainingError
from svbatch.tasks.grammar import NONE
from svbatch.tasks.task import Task, library_names, load_task
from svbatch.training.data import Example

LANGUAGES = {
    "en": "english",
    "de": "german",
    "fr": "french",
    "es": "spanish",
    "it": "italian",
    "nl": "dutch",
    "pt": "portuguese",
    "zh": "mandarin",
}


@dataclass(frozen=True)
class Known:
    """A task as it is asked of an example, and the true answer."""

    task: Task
    answer: str


def known_answers(name: str, examples: Sequence[Example]) -> dict[int, list[Known]]:
    """What is known of the library's task `name`, by index of example. Raises TrainingError for a name that is none."""
    if name not in library_names():
        raise TrainingError(f"questions: {name} is no task of the library; name one of {', '.join(library_names())}")
    found: Callable[[Sequence[Example]], Iterator[tuple[int, Known]]] = {
        "translation": _translations,
        "question": _questions,
        "slots": _slots,
        "keywords": _keywords,
    }.get(name, lambda examples: _labels(name, examples))
    known: dict[int, list[Known]] = {}
    for index, each in found(examples):
        known.setdefault(index, []).append(each)
    return known


def _labels(name: str, examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    values = {i: value for i, e in enumerate(examples) if (value := _label(name, e))}
    task = _task_with(name, sorted(set(values.values())))
    for i, value in values.items():
        if value in task.label_names:
            yield i, Known(task, value)


def _label(name: str, example: Example) -> str | None:
    if name == "language" and "language" not in example.labels:
        return None if not example.lang else LANGUAGES.get(example.lang.split("-")[0].lower(), "other")
    value = example.labels.get(name)
    return None if value is None else str(value)


def _task_with(name: str, seen: Sequence[str]) -> Task:
    """The library's task; with the labels that are seen where it lets a job choose them and lacks some."""
    bare = _loaded(json.dumps(name))
    parameter = next((p.name for p in bare.parameters if p.type == "labels"), None)
    if parameter is None or not set(seen) - set(bare.label_names):
        return bare
    labels = [{"name": label, "description": label.replace("_", " ")} for label in seen]
    return _loaded(json.dumps({name: {parameter: labels}}))


def _slots(examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    values = {i: slots for i, e in enumerate(examples) if (slots := _mapping("slots", e)) is not None}
    task = _task_with("slots", sorted({slot for slots in values.values() for slot in slots}))
    for i, slots in values.items():
        yield i, Known(task, "; ".join(f"{slot} = {value}" for slot, value in slots.items()) or NONE)


def _keywords(examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    task = _loaded(json.dumps("keywords"))
    for i, example in enumerate(examples):
        words = _parsed(example.labels.get("keywords"))
        if words is not None:
            yield i, Known(task, "; ".join(map(str, words)) or NONE)


def _translations(examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    for i, example in enumerate(examples):
        for language, text in (_mapping("translation", example) or {}).items():
            yield i, Known(_loaded(json.dumps({"translation": {"language": language}})), str(text))


def _questions(examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    for i, example in enumerate(examples):
        for question, answer in (_mapping("question", example) or {}).items():
            yield i, Known(_loaded(json.dumps({"question": {"question": question}})), str(answer))


def _mapping(name: str, example: Example) -> Mapping[str, Any] | None:
    value = _parsed(example.labels.get(name))
    if value is not None and not isinstance(value, Mapping):
        raise TrainingError(f"{example.path}: `{name}` is {value!r}; write an object, as docs/training.md shows")
    return value


def _parsed(value: Any) -> Any:
    """A value of our own manifest, or the JSON that another's text holds."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return [part.strip() for part in value.split(";") if part.strip()]


@cache
def _loaded(entry: str) -> Task:
    try:
        return load_task(json.loads(entry), Path())
    except TaskError as error:
        raise TrainingError(f"a manifest's labels do not fit their task: {error}") from error
