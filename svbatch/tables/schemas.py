"""Names and types of the library's tables, read from their data contracts `schemas/<table>.odcs.yaml`.

The contracts (Open Data Contract Standard 3.1) are the only place where columns are named. They lie in the
folder `schemas/` of the source tree and are installed as the package `svbatch.schemas`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources, util
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

ARROW_TYPES: dict[str, pa.DataType] = {  # by physicalType
    "varchar": pa.string(),
    "boolean": pa.bool_(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "timestamp_tz": pa.timestamp("us", tz="UTC"),
}


@cache
def arrow_schema(table: str) -> pa.Schema:
    """The schema of a library table; a column is nullable unless its contract says `required: true`."""
    contract = yaml.safe_load((_folder() / f"{table}.odcs.yaml").read_text(encoding="utf-8"))
    return pa.schema(_fields(contract["schema"][0]["properties"]))


def table_of(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` under the schema of a library table, in their order.

    Every key must be there and none else, in nested structs too; null only where the column is nullable.
    Raises ValueError naming the column, and pyarrow's own errors for a value of another type.
    """
    schema = arrow_schema(table)
    row_field = pa.field(table, pa.struct(list(schema)), nullable=False)
    for row in rows:
        _check(row, row_field, table)
    return pa.Table.from_pylist(rows, schema=schema)


def _folder() -> Traversable:
    if util.find_spec("svbatch.schemas"):
        return resources.files("svbatch.schemas")
    return Path(__file__).parents[2] / "schemas"


def _fields(properties: Sequence[Mapping[str, Any]]) -> list[pa.Field]:
    return [pa.field(each["name"], _type(each), nullable=not each["required"]) for each in properties]


def _type(prop: Mapping[str, Any]) -> pa.DataType:
    match prop["logicalType"]:
        case "array":
            return pa.list_(_type(prop["items"]))
        case "object":
            return pa.struct(_fields(prop["properties"]))
        case _:
            return ARROW_TYPES[prop["physicalType"]]


def _check(value: Any, field: pa.Field, where: str) -> None:
    if value is None:
        if not field.nullable:
            raise ValueError(f"{where}: null, but the column is required")
    elif pa.types.is_struct(field.type):
        names = [child.name for child in field.type]
        if problems := [f"no {name}" for name in names if name not in value]:
            raise ValueError(f"{where}: {', '.join(problems)} in {sorted(value)}")
        if problems := [f"unknown {name}" for name in value if name not in names]:
            raise ValueError(f"{where}: {', '.join(problems)}; the columns are {names}")
        for child in field.type:
            _check(value[child.name], child, f"{where}.{child.name}")
    elif pa.types.is_list(field.type):
        for element in value:
            _check(element, field.type.value_field, where)
