"""What a manifest's labels say are the true answers of a library task.

    any task of answer type label    its name, such as `emotion`: one of the task's labels, or a word that meanings.yaml
                                     has for it; `lang` serves for language. One that is told by the voice alone
                                     is learnt if MIN_SPEAKERS have it
    intent                           labels of the manifest's own are asked where any is none of the library's
    slots                            {"slot": "value", …}; where any is none of the library's these are all that is
                                     asked, and one that is not said is null
    keywords                         ["word", …]; an empty list is an answer too
    translation                      {"German": "…"}
    question                         {"What is asked?": "answer", …}

Of another kind of manifest, whose metadata are text, the last four are JSON in that text.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from svbatch.errors import TaskError, TrainingError
from svbatch.tasks.grammar import NONE
from svbatch.tasks.task import Task, library_names, load_task
from svbatch.training.data import Example

log = logging.getLogger(__name__)
MIN_SPEAKERS = 5
"""A label of the voice that fewer have would be learnt as their voices, or their microphone."""


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


def learnable_answers(name: str, examples: Sequence[Example]) -> dict[int, list[Known]]:
    """`known_answers` to learn from: without the labels of the voice that fewer than MIN_SPEAKERS have, which are
    named in the log."""
    known = known_answers(name, examples)
    speakers: dict[str, set[str]] = {}
    for i, own in known.items():
        if own[0].task.is_closed and "transcript" not in own[0].task.hears:
            speakers.setdefault(own[0].answer, set()).add(examples[i].speaker or examples[i].key)
    rare = {label for label, own in speakers.items() if len(own) < MIN_SPEAKERS}
    if rare:
        log.warning("%s: %s is left out: fewer than %d speakers have it", name, ", ".join(sorted(rare)), MIN_SPEAKERS)
    return {i: own for i, own in known.items() if own[0].answer not in rare}


def _labels(name: str, examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    values = {i: value for i, e in enumerate(examples) if (value := label_of(name, e))}
    task = _task_with(name, sorted(set(values.values())))
    for i, value in values.items():
        if value in task.label_names:
            yield i, Known(task, value)


def label_of(name: str, example: Example) -> str | None:
    """What a manifest says of an example, as the task calls it where meanings.yaml knows the word."""
    value = example.labels.get(name)
    if name == "language" and value is None:
        code = (example.lang or "").split("-")[0].lower()
        return _meanings()[name].get(code, "other") if code else None
    return None if value is None else str(_meanings().get(name, {}).get(value, value))


@cache
def _meanings() -> dict[str, dict[str, str]]:
    meanings: dict[str, dict[str, str]] = yaml.safe_load(
        Path(__file__).with_name("meanings.yaml").read_text(encoding="utf-8")
    )
    return meanings


def _task_with(name: str, seen: Sequence[str]) -> Task:
    """The library's task; with the labels that are seen where it lets a job choose them and lacks some."""
    bare = _loaded(json.dumps(name))
    parameter = next((p.name for p in bare.parameters if p.type == "labels"), None)
    if parameter is None or not set(seen) - set(bare.label_names):
        return bare
    labels = [{"name": label, "description": label.replace("_", " ")} for label in seen]
    return _loaded(json.dumps({name: {parameter: labels}}))


def _slots(examples: Sequence[Example]) -> Iterator[tuple[int, Known]]:
    library = set(_loaded(json.dumps("slots")).label_names)
    for i, example in enumerate(examples):
        slots = _mapping("slots", example)
        if slots is None:
            continue
        said = "; ".join(f"{slot} = {value}" for slot, value in slots.items() if value is not None)
        yield i, Known(_task_with("slots", sorted(slots) if set(slots) - library else ()), said or NONE)


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
