"""What table a task has: the contract of its columns, from its answer type."""

from collections.abc import Mapping
from typing import Any

from svbatch.errors import TaskError
from svbatch.tables.contracts import Contract, answer_contract, read_contract, table_names
from svbatch.tasks.definition import Property
from svbatch.tasks.task import Task

PHYSICAL_TYPES = {"string": "varchar", "integer": "bigint", "number": "double", "boolean": "boolean"}


def contract_of(task: Task) -> Contract:
    """The data contract of a task's table. Raises TaskError for a parameter whose column is taken."""
    if task.is_library and task.definition in table_names():
        return read_contract(task.definition)
    columns = "entries" if task.answer == "yes_no" and task.each else task.answer
    contract = answer_contract(
        task.name,
        task.description,
        columns,
        carried=[(p.column, p.description) for p in task.parameters if p.column],
        whole=bool(task.limits.whole),
        properties=[_column(name, prop) for name, prop in task.properties.items()],
    )
    names = [column["name"] for column in contract["schema"][0]["properties"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TaskError(
            f"{task.path}: `{twice[0]}` is a column of every such table; give the parameter another `column`"
        )
    return contract


def _column(name: str, prop: Property) -> Mapping[str, Any]:
    return {"name": name, **_type(prop), "required": False, "description": prop.description}


def _type(prop: Property) -> dict[str, Any]:
    if prop.type == "array":
        assert prop.items is not None, "a definition gives every array its items"
        return {"logicalType": "array", "items": _type(prop.items)}
    if prop.type == "object":
        return {"logicalType": "object", "properties": [_column(n, p) for n, p in prop.properties.items()]}
    return {"logicalType": prop.type, "physicalType": PHYSICAL_TYPES[prop.type]}
