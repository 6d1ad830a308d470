"""The job file: which corpus, which tasks, where to. docs/job.md describes every key."""

import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from svbatch.errors import JobError
from svbatch.tables.folder import is_address
from svbatch.tasks.task import Task, resolve_task
from svbatch.yaml_file import Problem, YamlFile, read_yaml, shown, validation_problems

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00]*$")]


class JobFile(BaseModel):
    """A job's keys, as they stand in the file, but for `tasks`, which are loaded."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    corpus: Annotated[tuple[Text, ...], Field(min_length=1)]
    tasks: tuple[Task, ...]
    output: Text
    follow_outside: bool = False
    bundle: Text = "mini"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    channels: Literal["mix", "first", "each"] = "mix"
    max_memory: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5} (MiB|GiB)$")] = "2 GiB"


class Job(BaseModel):
    """A job that can be run.

    path: its file. corpus: as written; relative entries start from `corpus_base`; `follow_outside` lets its links and
    manifests lead out of the entries' folders. output: an absolute Path, or an
    address. bundle: a name, or an absolute folder."""

    model_config = ConfigDict(frozen=True)

    path: Path
    corpus: tuple[str, ...]
    corpus_base: Path
    follow_outside: bool
    tasks: tuple[Task, ...]
    output: Path | str
    bundle: str
    precision: Literal["auto", "float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    channels: Literal["mix", "first", "each"]
    max_memory_bytes: int


def load_job(path: Path, *, corpus: Sequence[str] = (), output: Path | str | None = None) -> Job:
    """The job of a file. `corpus` and `output` stand in for the file's; relative ones start from the current
    folder, the file's own from its folder. Raises JobError with every problem on a line of its own."""
    file = _with_overrides(read_yaml(path, JobError), corpus, output)
    folder = Path(os.path.abspath(path.parent))
    values = dict(file.values)
    problems: list[Problem] = []
    if "tasks" in values:
        values["tasks"], problems = _tasks(values["tasks"], folder)
    try:
        keys = JobFile.model_validate(values)
    except ValidationError as error:
        problems += validation_problems(error, JobFile)
    if problems:
        raise JobError(file.report(problems))
    return Job(
        path=path,
        corpus=keys.corpus,
        corpus_base=Path.cwd() if corpus else folder,
        follow_outside=keys.follow_outside,
        tasks=keys.tasks,
        output=keys.output if is_address(keys.output) else Path(os.path.abspath(folder / keys.output)),
        bundle=os.path.abspath(folder / keys.bundle) if "/" in keys.bundle else keys.bundle,
        precision=keys.precision,
        device=keys.device,
        channels=keys.channels,
        max_memory_bytes=_bytes(keys.max_memory),
    )


def _bytes(size: str) -> int:
    number, unit = size.split()
    return int(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


def _with_overrides(file: YamlFile, corpus: Sequence[str], output: Path | str | None) -> YamlFile:
    """The file as if it held the overrides: lists for single values, and no line for what is not in it."""
    given: dict[str, Any] = {"corpus": tuple(corpus)} if corpus else {}
    if output is not None:
        given["output"] = output if is_address(output) else os.path.abspath(output)
    values = file.values | given
    if not isinstance(values.get("corpus", ()), tuple | dict):
        values["corpus"] = (values["corpus"],)
    lines = {location: line for location, line in file.lines.items() if location[0] not in given}
    return YamlFile(file.path, values, lines)


def _tasks(entries: object, folder: Path) -> tuple[tuple[Task, ...], list[Problem]]:
    """The tasks that could be loaded, and what is wrong with the others and between them."""
    tasks: dict[int, Task] = {}
    problems: list[Problem] = []
    if not isinstance(entries, tuple) or not entries:
        return (), [(("tasks",), "`tasks` must be a list, with a line such as `- asr` for each task")]
    for position, entry in enumerate(entries):
        found = resolve_task(entry, folder)
        if isinstance(found, Task):
            tasks[position] = found
        else:
            problems += [(("tasks", position, *location), message) for location, message in found]
    return tuple(tasks.values()), [*problems, *_name_problems(tasks, entries)]


def _name_problems(tasks: dict[int, Task], entries: Sequence[Any]) -> Iterator[Problem]:
    taken = {task.name for task in tasks.values()}
    seen: set[str] = set()
    for position, task in tasks.items():
        if task.name in seen:
            free = next(name for n in count(2) if (name := f"{task.name[:60]}_{n}") not in taken)
            taken.add(free)
            line = shown(_named(entries[position], free), limit=200)
            yield ("tasks", position), f"a task before this is named `{task.name}` too; write {line}"
        seen.add(task.name)


def _named(entry: Any, name: str) -> str:
    """The line of a job that gives an entry this name."""
    source, options = next(iter(entry.items())) if isinstance(entry, dict) else (entry, None)
    named = {**(options or {}), "name": name}
    flow = yaml.safe_dump(named, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return f"- {source}: {flow.strip()}"
