"""What a task's YAML file may say. The file is data: words, labels and choices, no code.

name: complaint                  its table, unless the job gives another
version: 1                       raise it to have everything answered anew
description: Whether the caller complains.
answer: yes_no
instructions:                    the first is the default; training uses all
  - Does the caller complain? Answer yes or no.
held_out:                        never trained on; they measure how much the wording matters
  - Is this a complaint? Answer yes or no.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from svbatch.errors import TaskError
from svbatch.tasks import prompts
from svbatch.yaml_file import Location, Problem, did_you_mean, read_yaml, shown, validation_problems

YES_NO = ("yes", "no")
CLOSED_ANSWERS = ("label", "yes_no", "labels")
LABELLED_ANSWERS = ("label", "labels", "pairs")
"""Answers that name labels of a set: one, each of them, or some with a value."""

TABLES = ("recordings", "failures", "runs", "forgotten")
COMMON_OPTIONS = ("name", "min_probability", "scope")
"""What a job may say of any task, beside the task's own parameters."""

MAX_BOUND = 10**15 - 1
MAX_NESTING = 4
RESERVED = ("labels", "label_descriptions", "label", "label_description")
"""What a wording's placeholders mean already."""

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


def _bound(value: object) -> float | int:
    if not isinstance(value, float | int) or isinstance(value, bool) or math.isnan(value):
        raise PydanticCustomError("number", "not a number")
    if abs(value) > MAX_BOUND:
        raise PydanticCustomError("number", f"not from -{MAX_BOUND} to {MAX_BOUND}")
    return value


Bound = Annotated[float | int, PlainValidator(_bound)]
Sense = Literal["audio", "transcript"]
Metric = Literal["word_error_rate", "bleu", "accuracy", "unweighted_average_recall", "macro_f1", "slu_f1"]


class Label(BaseModel):
    """One of a closed set of answers: the LLM answers `name`, a wording may tell it `description`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Text
    description: Text


class Parameter(BaseModel):
    """What a job may set of a task. `entry` is the placeholder for one of several `texts`. A parameter of type
    labels replaces the file's labels. `column` is where its value stands in every row of the task's table."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Word
    type: Literal["text", "choice", "texts", "labels"]
    description: Text
    required: bool = False
    default: Text | None = None
    choices: tuple[Text, ...] = ()
    entry: Word | None = None
    column: Word | None = None


class Limits(BaseModel):
    """What bounds a generated answer: of items and pairs how many, of texts in it how long, of a number its range and
    whether it is whole."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_items: Annotated[int, Field(ge=1, le=100)] | None = None
    max_chars: Annotated[int, Field(ge=1, le=400)] | None = None
    minimum: Bound | None = None
    maximum: Bound | None = None
    whole: bool | None = None


LIMITS_OF = {
    "items": {"max_items", "max_chars"},
    "pairs": {"max_items", "max_chars"},
    "number": {"minimum", "maximum", "whole"},
}
"""The limits that go with an answer type; the others have none."""


class Property(BaseModel):
    """One property of an object, a small part of JSON Schema: a text of one of `enum` or of up to 60 characters, a
    number, true or false, a list of up to 10 of `items`, or an object of `properties`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["string", "integer", "number", "boolean", "array", "object"]
    description: Text
    enum: tuple[Text, ...] = ()
    items: "Property | None" = None
    properties: dict[Word, "Property"] = {}


class Definition(BaseModel):
    """A task's YAML file, key by key (docs/tasks.md has the table)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Word
    version: Annotated[int, Field(ge=1)]
    description: Text
    answer: Literal["text", "label", "yes_no", "labels", "number", "items", "pairs", "object"]
    instructions: Annotated[tuple[Text, ...], Field(min_length=1)]
    held_out: tuple[Text, ...] = ()
    labels: tuple[Label, ...] = ()
    limits: Limits = Limits()
    properties: dict[Word, Property] = {}
    parameters: tuple[Parameter, ...] = ()
    each: Word | None = None
    spotting: bool = False
    hears: Annotated[tuple[Sense, ...], Field(min_length=1, max_length=2)] = ("audio", "transcript")
    scope: Literal["segment", "window", "recording"] = "segment"
    combine: Literal["any", "mean"] | None = None
    needs_speech: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_probability: Probability | None = None
    metric: Metric | None = None

    @property
    def is_closed(self) -> bool:
        """Whether its answers are scored, none generated."""
        return self.answer in CLOSED_ANSWERS

    def parameter(self, name: str) -> Parameter:
        """The parameter of that name, which exists."""
        return next(parameter for parameter in self.parameters if parameter.name == name)


def read_definition(path: Path) -> Definition:
    """A task's file. Raises TaskError with every problem on a line of its own: file, line, what to change."""
    file = read_yaml(path, TaskError)
    try:
        definition = Definition.model_validate(file.values)
    except ValidationError as error:
        raise TaskError(file.report(validation_problems(error, Definition))) from None
    if problems := list(_problems(definition)):
        raise TaskError(file.report(problems))
    return definition


def repeated(words: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Position and text of each word that stood before, whatever its case."""
    seen: set[str] = set()
    for position, word in enumerate(words):
        if word.casefold() in seen:
            yield position, word
        seen.add(word.casefold())


def label_problems(labels: tuple[Label, ...], answer: str) -> Iterator[Problem]:
    """What is wrong with the set of labels of a task with such an answer, by position in it."""
    least = 2 if answer == "label" else 1
    if len(labels) < least:
        yield (), f"{len(labels)} labels; an answer of type {answer} needs at least {least}"
    for position, name in repeated(tuple(label.name for label in labels)):
        yield (position,), f"the label {shown(name)} stands twice; keep one"
    for position, label in enumerate(labels):
        if answer == "pairs" and any(mark in label.name for mark in ";=\n"):
            yield (position,), f"the label {shown(label.name)} holds a `;`, `=` or line break, which part pairs"


def _problems(definition: Definition) -> Iterator[Problem]:
    if definition.name in TABLES:
        yield ("name",), f"`{definition.name}` is a table of every output; choose another name"
    yield from _answer_problems(definition)
    yield from _parameter_problems(definition)
    yield from _wording_problems(definition)


def _answer_problems(definition: Definition) -> Iterator[Problem]:
    asks_labels = definition.answer in LABELLED_ANSWERS
    if asks_labels and (definition.labels or not _labels_come_from_the_job(definition)):
        for location, message in label_problems(definition.labels, definition.answer):
            yield ("labels", *location), message
    if not asks_labels and definition.labels:
        yield ("labels",), f"an answer of type {definition.answer} has no labels; leave them out"
    if not definition.is_closed and definition.min_probability is not None:
        yield ("min_probability",), f"an answer of type {definition.answer} has no probability; leave it out"
    if definition.is_closed and definition.max_tokens is not None:
        yield ("max_tokens",), f"an answer of type {definition.answer} is scored, not generated; leave it out"
    yield from _limit_problems(definition)
    yield from scope_problems(definition)
    for position, sense in repeated(definition.hears):
        yield ("hears", position), f"`{sense}` stands twice; keep one"


def _limit_problems(definition: Definition) -> Iterator[Problem]:
    limits = definition.limits
    for key in limits.model_fields_set - LIMITS_OF.get(definition.answer, set()):
        yield ("limits", key), f"an answer of type {definition.answer} has no `{key}`; leave it out"
    if limits.minimum is not None and limits.maximum is not None and limits.minimum > limits.maximum:
        yield ("limits", "minimum"), f"{limits.minimum} is above the maximum, {limits.maximum}"
    elif limits.whole and None not in (limits.minimum, limits.maximum) and _no_whole_number_between(limits):
        yield ("limits", "whole"), f"no whole number lies between {limits.minimum} and {limits.maximum}"
    if (definition.answer == "object") != bool(definition.properties):
        yield ("properties",), "`properties` go with an answer of type object, and with no other"
    yield from _property_problems(definition.properties, ("properties",), depth=1)


def scope_problems(definition: Definition) -> Iterator[Problem]:
    """What does not go with the scope of a task."""
    if definition.scope == "window" and "transcript" in definition.hears:
        yield ("hears",), "windows are heard, not transcribed; write `hears: [audio]`"
    whole = definition.scope == "recording"
    if whole and definition.answer in ("number", "object"):
        yield ("scope",), f"answers of type {definition.answer} are not combined over segments; choose scope segment"
    if whole and not definition.needs_speech:
        yield ("needs_speech",), "a whole recording is asked by its segments of speech; leave it out"
    if definition.combine is not None and not (whole and definition.answer in ("yes_no", "labels")):
        yield ("combine",), "`combine` goes with scope recording and an answer of type yes_no or labels; leave it out"


def _no_whole_number_between(limits: Limits) -> bool:
    return math.ceil(limits.minimum or 0) > math.floor(limits.maximum or 0)


def _property_problems(properties: Mapping[str, Property], where: Location, depth: int) -> Iterator[Problem]:
    for name, prop in properties.items():
        yield from _one_property_problems(prop, (*where, name), depth)


def _one_property_problems(prop: Property, where: Location, depth: int) -> Iterator[Problem]:
    if depth > MAX_NESTING:
        yield where, f"nested more than {MAX_NESTING} deep; make it flatter"
        return
    if "enum" in prop.model_fields_set and not prop.enum:
        yield (*where, "enum"), "an empty list; write the choices, or leave it out"
    if prop.enum and prop.type != "string":
        yield (*where, "enum"), "`enum` goes with type string"
    for position, choice in repeated(prop.enum):
        yield (*where, "enum", position), f"{shown(choice)} stands twice; keep one"
    if (prop.type == "array") != (prop.items is not None):
        yield (*where, "items"), "`items` go with type array, and with no other"
    if (prop.type == "object") != bool(prop.properties):
        yield (*where, "properties"), "`properties` go with type object, and with no other"
    if prop.items is not None:
        yield from _one_property_problems(prop.items, (*where, "items"), depth + 1)
    yield from _property_problems(prop.properties, (*where, "properties"), depth + 1)


def _labels_come_from_the_job(definition: Definition) -> bool:
    return any(parameter.type == "labels" and parameter.required for parameter in definition.parameters)


def _parameter_problems(definition: Definition) -> Iterator[Problem]:
    names = tuple(parameter.name for parameter in definition.parameters)
    for position, name in repeated(names):
        yield ("parameters", position), f"the parameter `{name}` stands twice; keep one"
    for position, parameter in enumerate(definition.parameters):
        for key, message in _one_parameter_problems(parameter, definition):
            yield ("parameters", position, key), message
    if definition.each is not None and definition.answer != "yes_no":
        yield ("each",), "one question for each entry is asked by a task of answer yes_no; leave it out"
    if definition.spotting and (definition.each is None or definition.answer != "yes_no"):
        yield ("spotting",), "words are spotted in a task of answer yes_no with `each`; leave it out"
    if definition.each is not None and definition.each not in names:
        yield ("each",), f"`{definition.each}` is no parameter{did_you_mean(definition.each, names)}"


def _one_parameter_problems(parameter: Parameter, definition: Definition) -> Iterator[tuple[str, str]]:
    name, type_ = parameter.name, parameter.type
    if name in COMMON_OPTIONS:
        yield "name", f"every task has `{name}`; choose another name"
    if (name in RESERVED and type_ != "labels") or parameter.entry in RESERVED:
        yield "name", f"in a wording `{name}` means the task's own labels; choose another name"
    if parameter.default is not None and type_ not in ("text", "choice"):
        yield "default", f"a parameter of type {type_} has no default; leave it out"
    if parameter.column and [p.column for p in definition.parameters].count(parameter.column) > 1:
        yield "column", f"another parameter has the column `{parameter.column}` too; choose another"
    if type_ == "labels" and definition.answer not in LABELLED_ANSWERS:
        yield "type", f"an answer of type {definition.answer} has no labels; leave the parameter out"
    if type_ == "labels" and [p.type for p in definition.parameters].count("labels") > 1:
        yield "type", "another parameter is of type labels too; keep one"
    if parameter.required and parameter.default is not None:
        yield "default", f"`{name}` is required, so its default is never used; leave one of the two out"
    if type_ in ("text", "choice") and not parameter.required and parameter.default is None:
        yield "default", f"`{name}` has no default; give one, or say `required: true`"
    if type_ == "texts" and not parameter.required:
        yield "required", f"`{name}` is of type texts; say `required: true`"
    if parameter.column is not None and type_ not in ("text", "choice"):
        yield "column", "`column` goes with type text and choice"
    if (type_ == "choice") != bool(parameter.choices):
        yield "choices", "choices go with type choice, and with no other"
    elif parameter.default is not None and type_ == "choice" and parameter.default not in parameter.choices:
        yield "default", f"{shown(parameter.default)} is none of {', '.join(parameter.choices)}"
    if (parameter.entry is not None) != (name == definition.each) or (parameter.entry and type_ != "texts"):
        yield "entry", "`entry` goes with the parameter of type texts that `each` names, and with no other"


def _wording_problems(definition: Definition) -> Iterator[Problem]:
    known = {p.name for p in definition.parameters if p.type in ("text", "choice")}
    known |= {"labels", "label_descriptions"} if definition.answer in LABELLED_ANSWERS else set()
    entries = {p.entry for p in definition.parameters if p.entry and p.name == definition.each}
    entries |= {"label"} if definition.answer == "labels" else set()
    known |= {"label_description"} if definition.answer == "labels" else set()
    wordings = (*definition.instructions, *definition.held_out)
    for position, wording in enumerate(wordings):
        location = _wording_location(definition, position)
        try:
            used = prompts.placeholders(wording)
        except TaskError as error:
            yield location, str(error)
            continue
        for name in sorted(used - known - entries):
            yield location, f"the placeholder {shown(name)}{did_you_mean(name, sorted(known | entries))}"
        for name in sorted(entries - used):
            yield location, f"{{{{ {name} }}}} is missing: the question is asked once per {name}"
    for position, wording in repeated(wordings):
        yield _wording_location(definition, position), f"{shown(wording)} stands twice; keep one"


def _wording_location(definition: Definition, position: int) -> Location:
    first = len(definition.instructions)
    return ("instructions", position) if position < first else ("held_out", position - first)
