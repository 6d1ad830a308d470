"""A task as a job asks it: a definition with its parameters' values. A job names it in one of three ways:

asr                                                   the library's, as it is
keyword_search: {keywords: [lawyer], name: legal}     with parameters, and a table's name
./tasks/complaint.yaml                                the user's own; parameters go with it as above
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from svbatch.errors import TaskError
from svbatch.tasks import prompts
from svbatch.tasks.definition import (
    COMMON_OPTIONS,
    TABLES,
    YES_NO,
    Definition,
    Label,
    Parameter,
    Probability,
    Word,
    label_problems,
    read_definition,
    repeated,
    scope_problems,
)
from svbatch.yaml_file import Location, Problem, did_you_mean, shown, shown_path

LIBRARY_DIR = Path(__file__).parent / "library"


class Task(Definition):
    """A definition whose name and labels are the job's, where the job gives any.

    path: its file. definition: its name in that file, which is the name of a library task's table schema.
    values: one for every parameter but labels."""

    path: Path
    definition: str
    values: dict[str, str | tuple[str, ...]]

    @property
    def is_library(self) -> bool:
        """Whether it is one of svbatch's own, and not a user's."""
        return self.path.parent == LIBRARY_DIR

    @property
    def scored(self) -> tuple[str, ...]:
        """The answers to one question that are scored, in the order of their scores; empty for an open task."""
        if self.answer == "label":
            return self.label_names
        return YES_NO if self.is_closed else ()

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of the labels, of the file or of the job."""
        return tuple(label.name for label in self.labels)

    @property
    def entries(self) -> tuple[str, ...]:
        """What the task asks about one by one: keywords, or each of its labels; empty if it asks one question."""
        if self.answer == "labels":
            return self.label_names
        return tuple(self.values[self.each]) if self.each else ()

    @property
    def carried(self) -> dict[str, str]:
        """The values of parameters that stand in every row, by column."""
        return {p.column: str(self.values[p.name]) for p in self.parameters if p.column}

    def questions(self, wording: str | None = None) -> tuple[str, ...]:
        """The rendered instructions: one per entry, or one. `wording` is one of the task's `instructions` or
        `held_out`; None is the default one."""
        template = self.instructions[0] if wording is None else wording
        slots = {name: value for name, value in self.values.items() if isinstance(value, str)}
        slots["labels"] = ", ".join(self.label_names)
        slots["label_descriptions"] = "; ".join(f"{label.name}: {label.description}" for label in self.labels)
        if self.answer == "labels":
            each = [{"label": label.name, "label_description": label.description} for label in self.labels]
            return tuple(prompts.render(template, slots | own) for own in each)
        if self.each is None:
            return (prompts.render(template, slots),)
        entry = self.parameter(self.each).entry or self.each
        return tuple(prompts.render(template, {**slots, entry: text}) for text in self.entries)


def library_names() -> list[str]:
    """The names of the tasks that come with svbatch."""
    return sorted(path.stem for path in LIBRARY_DIR.glob("*.yaml"))


@cache
def library_labels(name: str) -> tuple[str, ...]:
    """The names of the labels that a task of the library has where a job gives it none."""
    return bare_task(name, Path()).label_names


def load_task(entry: object, base: Path) -> Task:
    """The task of one entry of a job's `tasks`: a name, a path relative to `base`, or a mapping of one of
    these to its options. Raises TaskError with every problem on a line of its own."""
    found = resolve_task(entry, base)
    if isinstance(found, Task):
        return found
    raise TaskError("\n".join(f"{_keys(location)}{message}" for location, message in found))


def resolve_task(entry: object, base: Path) -> Task | list[Problem]:
    """As `load_task`, but problems are returned, each with its location in the entry: ("asr", "via")."""
    named = {entry: {}} if isinstance(entry, str) else entry
    pairs = list(named.items()) if isinstance(named, Mapping) else []
    source, options = pairs[0] if len(pairs) == 1 else (None, None)
    if not isinstance(source, str) or not isinstance(options, Mapping | None):
        return [((), f"{shown(entry)} is no task; write `asr`, or `asr: {{via: llm}}` with options")]
    try:
        path = _path(source, base)
        definition = _definition(path)
    except TaskError as error:
        return [((source,), line) for line in str(error).splitlines()]
    task = _with_options(definition, path, options or {})
    return task if isinstance(task, Task) else [((source, *where), message) for where, message in task]


def bare_task(source: str, base: Path) -> Task:
    """The task of a name or a path relative to `base`, without what a job says of it. Raises TaskError."""
    path = _path(source, base)
    definition = _definition(path)
    return Task.model_validate({**dict(definition), "values": {}, "path": path, "definition": definition.name})


def task_version(task: Task, bundle_id: str, settings: Mapping[str, Any]) -> str:
    """16 hex digits of sha256 over all that can change an answer: what is asked and of what, the bundle, and
    `settings` (JSON values: segmentation, decoding). Not the task's name, nor wordings that are not asked."""
    asked = task.model_dump(
        mode="json",
        include={
            *("answer", "version", "labels", "limits", "properties", "each", "spotting", "combine"),
            *("hears", "scope", "needs_speech", "max_tokens"),
        },
    )
    asked |= {"instruction": task.instructions[0], "values": task.values, "hears": sorted(task.hears)}
    asked |= {"min_probability": task.min_probability}
    whole = {"task": asked, "bundle": bundle_id, "settings": dict(settings)}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keys(location: Location) -> str:
    return "".join(f"{part + 1 if isinstance(part, int) else part}: " for part in location)


def _path(source: str, base: Path) -> Path:
    if "/" in source or source.endswith((".yaml", ".yml")):
        return base / source
    names = library_names()
    if source not in names:
        hint = did_you_mean(source, names)
        raise TaskError(f"unknown task {shown(source)}{hint}; your own starts with ./ or ends in .yaml")
    return LIBRARY_DIR / f"{source}.yaml"


def _definition(path: Path) -> Definition:
    definition = read_definition(path)
    if path.parent != LIBRARY_DIR and definition.name in library_names():
        raise TaskError(f"{shown_path(path)}: `{definition.name}` is a task of the library; choose another name")
    return definition


def _with_options(definition: Definition, path: Path, options: Mapping[str, Any]) -> Task | list[Problem]:
    problems = list(_option_problems(options, definition))
    values: dict[str, Any] = {}
    for parameter in definition.parameters:
        values[parameter.name], found = _value(parameter, options, definition.answer)
        problems += found
    if problems:
        return problems
    given_labels = next((values.pop(p.name) for p in definition.parameters if p.type == "labels"), None)
    labels = given_labels or definition.labels
    common = {key: options[key] for key in COMMON_OPTIONS if key in options}
    given = {"labels": labels, "values": values, "path": path, "definition": definition.name, **common}
    return Task.model_validate({**dict(definition), **given})


def _option_problems(options: Mapping[str, Any], definition: Definition) -> Iterator[Problem]:
    known = [*(parameter.name for parameter in definition.parameters), *COMMON_OPTIONS]
    for key in options:
        if key not in known:
            yield (key,), f"unknown key {shown(key)}{did_you_mean(str(key), known)}"
    name = options.get("name", definition.name)
    if name in TABLES:
        yield ("name",), f"`{name}` is a table of every output; choose another name"
    if name in library_names() and name != definition.name:
        yield ("name",), f"`{name}` is another task of the library; choose another name"
    if not _fits(Word, name):
        yield ("name",), f"{shown(name)} names a table: small letters, digits and `_`, a letter first"
    if "min_probability" in options:
        if not definition.is_closed:
            yield ("min_probability",), "this task's answers have no probability; leave the key out"
        elif not _fits(Probability, options["min_probability"]):
            yield ("min_probability",), f"{shown(options['min_probability'])} is no number from 0 to 1"
    if "scope" in options:
        if definition.scope != "segment" or options["scope"] != "recording":
            yield ("scope",), "a job says `scope: recording` of a task about segments, and nothing else; leave it out"
        else:
            whole = definition.model_copy(update={"scope": "recording"})
            yield from ((("scope",), message) for _, message in scope_problems(whole))


def _fits(annotation: Any, value: object) -> bool:
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _value(parameter: Parameter, options: Mapping[str, Any], answer: str) -> tuple[Any, list[Problem]]:
    """The value of one parameter of a task with such an answer, and what is wrong with it."""
    if parameter.name not in options:
        missing = f"the key `{parameter.name}` is missing: {parameter.description}"
        return parameter.default, [((), missing)] if parameter.required else []
    given = options[parameter.name]
    several = parameter.type in ("texts", "labels")
    if several and not (isinstance(given, list | tuple) and given):
        return None, [((parameter.name,), f"`{parameter.name}` must be a list of at least one")]
    if parameter.type == "labels":
        return _labels_of(parameter, given, answer)
    value, found = _texts(given if several else (given,))
    if parameter.type == "choice" and not found and value[0] not in parameter.choices:
        found = [((), f"{shown(value[0])}{did_you_mean(value[0], parameter.choices)}")]
    located = [((parameter.name, *(where if several else ())), message) for where, message in found]
    return value if several or found else value[0], located


def _labels_of(parameter: Parameter, given: Sequence[Any], answer: str) -> tuple[Any, list[Problem]]:
    labels, found = _labels(given, answer)
    return labels, [((parameter.name, *where), message) for where, message in found]


def _texts(given: Sequence[Any]) -> tuple[tuple[str, ...], list[Problem]]:
    found: list[Problem] = []
    texts = tuple(" ".join(text.split()) if isinstance(text, str) else "" for text in given)
    for position, (text, original) in enumerate(zip(texts, given, strict=True)):
        if not isinstance(original, str):
            found.append(((position,), f"{shown(original)} is not text; put it in quotes"))
        elif not text:
            found.append(((position,), "an empty text; remove it, or write one"))
    if not found:
        found = [((position,), f"{shown(text)} stands twice; keep one") for position, text in repeated(texts)]
    return texts, found


def _labels(given: Sequence[Any], answer: str) -> tuple[tuple[Label, ...], list[Problem]]:
    labels = []
    found: list[Problem] = []
    for position, label in enumerate(given):
        try:
            labels.append(Label.model_validate(label))
        except ValidationError as error:
            keys = ", ".join(str(detail["loc"][-1]) for detail in error.errors() if detail["loc"])
            found.append(((position,), f"write {{name: …, description: …}}; wrong: {keys or shown(label)}"))
    return tuple(labels), found or list(label_problems(tuple(labels), answer))
