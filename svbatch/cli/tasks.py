"""svbatch tasks: what can be asked."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

from svbatch.contract import contract_of
from svbatch.errors import TaskError
from svbatch.tasks.definition import Definition
from svbatch.tasks.task import bare_task, library_names


@click.group()
def tasks() -> None:
    """Tasks: those that come with svbatch, and your own.

    A TASK is a name of the library, or the path of a YAML file.

    \b
    Example:  svbatch tasks list
              svbatch tasks check tasks/complaint.yaml
    """


@tasks.command("list")
def list_tasks() -> None:
    """List the tasks of the library.

    \b
    Example:  svbatch tasks list
    """
    for name in library_names():
        task = bare_task(name, Path())
        click.echo(f"{name:16}{task.answer:8}{task.description}")


@tasks.command()
@click.argument("task")
def show(task: str) -> None:
    """Show what TASK asks, with which options, and the columns of its table.

    \b
    Example:  svbatch tasks show intent
    """
    click.echo("\n".join(_shown(task)))


@tasks.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
def check(files: tuple[Path, ...]) -> None:
    """Check task FILES. Exits 2 with a line for every problem.

    \b
    Example:  svbatch tasks check tasks/*.yaml
    """
    problems = [problem for file in files for problem in _problems(file)]
    if problems:
        click.echo("\n".join(problems), err=True)
        sys.exit(2)
    click.echo(f"{len(files)} task{'s' if len(files) > 1 else ''} without a mistake")


@tasks.command()
@click.argument("task")
def schema(task: str) -> None:
    """Write the data contract (ODCS 3.1 YAML) of the table of TASK.

    \b
    Example:  svbatch tasks schema tasks/complaint.yaml > complaint.odcs.yaml
    """
    contract = contract_of(bare_task(task, Path()))
    click.echo(
        yaml.dump(dict(contract), Dumper=_PlainDumper, sort_keys=False, width=1000, allow_unicode=True), nl=False
    )


class _PlainDumper(yaml.SafeDumper):
    """Writes a value that stands twice out twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _shown(source: str) -> Iterator[str]:
    task = bare_task(source, Path())
    yield f"{task.name} {task.version}: {task.description}"
    yield f"answers with {task.answer}, of each {task.scope}; hears {' and '.join(task.hears)}"
    yield from _listed("options in a job", (_option(task, name) for name in (p.name for p in task.parameters)))
    yield from _listed("labels", (f"{label.name}: {label.description}" for label in task.labels))
    yield from _listed("wordings", task.instructions)
    yield from _listed("wordings that are never trained on", task.held_out)
    columns = contract_of(task)["schema"][0]["properties"]
    yield from _listed("columns", (f"{column['name']}: {column['description']}" for column in columns))


def _option(task: Definition, name: str) -> str:
    parameter = task.parameter(name)
    choices = f" ({', '.join(parameter.choices)})" if parameter.choices else ""
    default = f"; default {parameter.default}" if parameter.default else "; required" if parameter.required else ""
    return f"{name}: {parameter.description}{choices}{default}"


def _listed(title: str, lines: Iterator[str] | tuple[str, ...]) -> Iterator[str]:
    known = list(lines)
    if known:
        yield f"\n{title}"
        yield from (f"  {line}" for line in known)


def _problems(file: Path) -> list[str]:
    try:
        contract_of(bare_task(f"./{file}" if file.parent == Path() else str(file), Path()))
    except TaskError as error:
        return str(error).splitlines()
    return []
