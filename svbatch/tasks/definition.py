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

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from svbatch.errors import TaskError
from svbatch.tasks import prompts
from svbatch.yaml_file import Location, Problem, did_you_mean, read_yaml, shown, validation_problems

YES_NO = ("yes", "no")
CLOSED_ANSWERS = ("label", "yes_no", "labels")
TABLES = ("recordings", "failures", "runs")
COMMON_OPTIONS = ("name", "min_probability")
"""What a job may say of any task, beside the task's own parameters."""

Word = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Sense = Literal["audio", "transcript"]


class Label(BaseModel):
    """One of a closed set of answers: the LLM answers `name`, a wording may tell it `description`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Text
    description: Text


class Parameter(BaseModel):
    """What a job may set of a task. `entry` is the placeholder for one of several `texts`. The parameter
    `labels`, of type labels, replaces the file's labels."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Word
    type: Literal["text", "choice", "texts", "labels"]
    description: Text
    required: bool = False
    default: Text | None = None
    choices: tuple[Text, ...] = ()
    entry: Word | None = None


class Definition(BaseModel):
    """A task's YAML file, key by key (docs/job.md has the table)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Word
    version: Annotated[int, Field(ge=1)]
    description: Text
    answer: Literal["text", "label", "yes_no", "labels", "number", "items", "pairs", "object"]
    instructions: Annotated[tuple[Text, ...], Field(min_length=1)]
    held_out: tuple[Text, ...] = ()
    labels: tuple[Label, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    each: Word | None = None
    spotting: bool = False
    hears: Annotated[tuple[Sense, ...], Field(min_length=1, max_length=2)] = ("audio", "transcript")
    scope: Literal["segment", "window", "recording"] = "segment"
    needs_speech: bool = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_probability: Probability | None = None
    metric: Literal["word_error_rate", "accuracy", "unweighted_average_recall"] | None = None

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


def label_problems(labels: tuple[Label, ...]) -> Iterator[Problem]:
    """What is wrong with a set of labels, by position in it."""
    if len(labels) < 2:
        yield (), f"{len(labels)} labels; a closed answer needs at least two"
    for position, name in repeated(tuple(label.name for label in labels)):
        yield (position,), f"the label {shown(name)} stands twice; keep one"


def _problems(definition: Definition) -> Iterator[Problem]:
    if definition.name in TABLES:
        yield ("name",), f"`{definition.name}` is a table of every output; choose another name"
    yield from _answer_problems(definition)
    yield from _parameter_problems(definition)
    yield from _wording_problems(definition)


def _answer_problems(definition: Definition) -> Iterator[Problem]:
    asks_labels = definition.answer in ("label", "labels")
    if asks_labels and (definition.labels or not _labels_come_from_the_job(definition)):
        for location, message in label_problems(definition.labels):
            yield ("labels", *location), message
    if not asks_labels and definition.labels:
        yield ("labels",), f"an answer of type {definition.answer} has no labels; leave them out"
    if not definition.is_closed and definition.min_probability is not None:
        yield ("min_probability",), f"an answer of type {definition.answer} has no probability; leave it out"
    if definition.is_closed and definition.max_tokens is not None:
        yield ("max_tokens",), f"an answer of type {definition.answer} is scored, not generated; leave it out"
    for position, sense in repeated(definition.hears):
        yield ("hears", position), f"`{sense}` stands twice; keep one"


def _labels_come_from_the_job(definition: Definition) -> bool:
    return any(parameter.type == "labels" and parameter.required for parameter in definition.parameters)


def _parameter_problems(definition: Definition) -> Iterator[Problem]:
    names = tuple(parameter.name for parameter in definition.parameters)
    for position, name in repeated(names):
        yield ("parameters", position), f"the parameter `{name}` stands twice; keep one"
    for position, parameter in enumerate(definition.parameters):
        for key, message in _one_parameter_problems(parameter, definition):
            yield ("parameters", position, key), message
    if definition.spotting and (definition.each is None or definition.answer != "yes_no"):
        yield ("spotting",), "words are spotted in a task of answer yes_no with `each`; leave it out"
    if definition.each is not None and definition.each not in names:
        yield ("each",), f"`{definition.each}` is no parameter{did_you_mean(definition.each, names)}"


def _one_parameter_problems(parameter: Parameter, definition: Definition) -> Iterator[tuple[str, str]]:
    name, type_ = parameter.name, parameter.type
    if name in COMMON_OPTIONS:
        yield "name", f"every task has `{name}`; choose another name"
    if (name == "labels") != (type_ == "labels"):
        yield "type", "the parameter labels, and no other, is of type labels"
    if parameter.required and parameter.default is not None:
        yield "default", f"`{name}` is required, so its default is never used; leave one of the two out"
    if type_ in ("text", "choice") and not parameter.required and parameter.default is None:
        yield "default", f"`{name}` has no default; give one, or say `required: true`"
    if type_ == "texts" and not parameter.required:
        yield "required", f"`{name}` is of type texts; say `required: true`"
    if (type_ == "choice") != bool(parameter.choices):
        yield "choices", "choices go with type choice, and with no other"
    elif parameter.default is not None and type_ == "choice" and parameter.default not in parameter.choices:
        yield "default", f"{shown(parameter.default)} is none of {', '.join(parameter.choices)}"
    if (parameter.entry is not None) != (name == definition.each) or (parameter.entry and type_ != "texts"):
        yield "entry", "`entry` goes with the parameter of type texts that `each` names, and with no other"


def _wording_problems(definition: Definition) -> Iterator[Problem]:
    known = {p.name for p in definition.parameters if p.type in ("text", "choice")}
    known |= {"labels", "label_descriptions"} if definition.answer in ("label", "labels") else set()
    entries = {p.entry for p in definition.parameters if p.entry and p.name == definition.each}
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
