"""A YAML file that a person wrote, read as plain values that remember their lines.

Stricter than YAML where YAML surprises: keys are words and stand once, there are no tags, anchors or aliases,
and nothing is built but text, numbers, true/false, null, lists and mappings. Every problem is one line:
"job.yaml, line 3: unknown key `taks`; did you mean `tasks`?".
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from svbatch.errors import SvbatchError

Location = tuple[str | int, ...]
"""Keys and list positions from the top of the file: ("labels", 2, "name")."""

Problem = tuple[Location, str]
"""Where, and what is wrong and what to do about it, without a place."""


@dataclass(frozen=True)
class YamlFile:
    """Lists are tuples, so that pydantic's strict mode takes them for tuples. Lines are counted from 1."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Location, int]

    def report(self, problems: Iterable[Problem]) -> str:
        """Each problem on a line of its own, behind the file and its line, in the order of lines. A problem
        whose location the file does not hold takes the line of what is around it."""
        placed = [(self._line(location), message) for location, message in problems]
        return "\n".join(_at(self.path, line, message) for line, message in sorted(placed, key=itemgetter(0)))

    def _line(self, location: Location) -> int:
        """0 where nothing of the location is in the file."""
        around = (self.lines.get(location[:length]) for length in range(len(location), 0, -1))
        return next((line for line in around if line is not None), 0)


def read_yaml(path: Path, refusal: type[SvbatchError]) -> YamlFile:
    """The file's values, which are a mapping at the top. Raises `refusal`, with one line per problem."""
    text = _read_text(path, refusal)
    reader = _Reader()
    try:
        node = yaml.compose(text, Loader=_Loader)
        values = reader.value(node, ()) if node else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise refusal(_at(path, mark.line + 1 if mark else 0, _syntax_message(error))) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise refusal(_at(path, line, "a control character; remove it")) from None
    except (RecursionError, ValueError, IndexError):
        raise refusal(_at(path, 0, "not YAML, or nested too deeply")) from None
    if reader.problems:
        raise refusal("\n".join(_at(path, line, message) for line, message in reader.problems))
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, tuple) else "empty" if values is None else "a single value"
        raise refusal(_at(path, 0, f"the file is {kind}; write lines of the form `key: value`"))
    return YamlFile(path, values, reader.lines)


def validation_problems(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem that pydantic found, in this project's words. Pydantic also calls a list too short when
    an entry of it is wrong; that is left out."""
    details = error.errors()
    around = {detail["loc"][:-1] for detail in details}
    return [
        (detail["loc"], _message(detail, model))
        for detail in details
        if detail["type"] != "too_short" or detail["loc"] not in around
    ]


def shown(value: object, limit: int = 60) -> str:
    """A value as it stands in a message: between backticks, on one line, at most `limit` characters."""
    text = _on_one_line(str(value)[: limit + 1])
    return f"`{text}`" if len(text) <= limit else f"`{text[: limit - 3]}...`"


def shown_path(path: Path) -> str:
    """A path as it stands in a message: on one line."""
    return _on_one_line(str(path))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: "; did you mean `tasks`?", or what is known."""
    choice = list(known)
    nearest = difflib.get_close_matches(word[:100], choice, n=1, cutoff=0.6)
    return f"; did you mean `{nearest[0]}`?" if nearest else f"; known: {', '.join(choice)}"


class _Loader(yaml.SafeLoader):
    """Composes nodes only. An alias is refused before it can refer to itself, or be expanded many times."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "an alias (*); write the value out", mark)
        return super().compose_node(parent, index)


class _Reader:
    """Turns nodes into values, and keeps the line of each and what is wrong with any."""

    def __init__(self) -> None:
        self.lines: dict[Location, int] = {}
        self.problems: list[tuple[int, str]] = []
        self._constructor = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, location: Location) -> Any:
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return self._mapping(node, location)
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            for position, child in enumerate(node.value):
                self.lines[(*location, position)] = _line(child)
            return tuple(self.value(child, (*location, i)) for i, child in enumerate(node.value))
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        self.problems.append((_line(node), f"the tag {shown(node.tag)}; write the value without it"))
        return None

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            key = self.value(key_node, location)
            if not isinstance(key, str):
                self.problems.append((line, f"the key {shown(getattr(key_node, 'value', ''))} is not a word"))
            elif key in values:
                first = self.lines[(*location, key)]
                self.problems.append((line, f"the key {shown(key)} stands on line {first} already; keep one"))
            else:
                self.lines[(*location, key)] = line
                values[key] = self.value(value_node, (*location, key))
        return values

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind in ("str", "timestamp", "value", "merge"):
            if any("\ud800" <= c <= "\udfff" for c in node.value):
                self.problems.append((_line(node), f"{shown(node.value)} holds half a surrogate pair"))
            return node.value
        try:
            return {
                "null": self._constructor.construct_yaml_null,
                "bool": self._constructor.construct_yaml_bool,
                "int": self._constructor.construct_yaml_int,
                "float": self._constructor.construct_yaml_float,
            }[kind](node)
        except KeyError:
            self.problems.append((_line(node), f"the tag {shown(node.tag)}; write the value without it"))
        except (ValueError, IndexError):
            self.problems.append((_line(node), f"{shown(node.value)} is not a number; put text in quotes"))
        return None


def _read_text(path: Path, refusal: type[SvbatchError]) -> str:
    try:
        if not path.is_file():
            raise refusal(_at(path, 0, "not a file" if path.exists() else "no such file"))
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise refusal(_at(path, line, "not UTF-8; save the file as UTF-8 text")) from None
    except OSError as error:
        raise refusal(_at(path, 0, f"cannot be read: {error.strerror}")) from None


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _at(path: Path, line: int, message: str) -> str:
    return f"{shown_path(path)}{f', line {line}' if line else ''}: {message}"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not YAML"
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if "expected a single document" in str(error.context):
        return "a second document (---); keep one per file"
    return " ".join(problem.split())


def _message(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location, kind, value = detail["loc"], detail["type"], detail["input"]
    name = ".".join(str(part + 1) if isinstance(part, int) else part for part in location)
    if kind == "extra_forbidden":
        return f"unknown key {shown(location[-1])}{did_you_mean(str(location[-1]), _keys(model, location))}"
    if kind == "missing":
        return f"the key `{name}` is missing"
    if kind == "literal_error":
        choice = detail["ctx"]["expected"].replace("'", "")
        return f"`{name}` is {shown(value)}; choose {choice}"
    if kind == "string_type" and isinstance(value, bool | int | float | None):
        return f"`{name}` is read as {_kind(value)}; for text, put it in quotes"
    if kind in ("tuple_type", "dict_type", "model_type"):
        return f"`{name}` must be {'a list' if kind == 'tuple_type' else 'a mapping'}, not {_kind(value)}"
    if kind in ("too_short", "string_too_short"):
        return f"`{name}` is empty; write at least one"
    if kind == "string_pattern_mismatch":
        return f"`{name}` is {shown(value)}; it must match {detail['ctx']['pattern']}"
    return f"`{name}` is {_kind(value)}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _kind(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, dict | tuple):
        return "a mapping" if isinstance(value, dict) else "a list"
    return shown(value) if isinstance(value, str) else str(value).lower()


def _keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The known keys beside the last part of a location."""
    parts = iter(location[:-1])
    for part in parts:
        if isinstance(part, str):
            inner = model.model_fields[part].annotation
            models = [inner, *get_args(inner)]
            if get_origin(inner) is dict:
                next(parts, None)  # a key of the user's own
            model = next(m for m in models if isinstance(m, type) and issubclass(m, BaseModel))
    return list(model.model_fields)
