"""Arrow schemas of the tables, from their data contracts, and rows under them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from svbatch.tables.contracts import Contract, read_contract

ARROW_TYPES: dict[str, pa.DataType] = {  # by physicalType
    "varchar": pa.string(),
    "boolean": pa.bool_(),
    "integer": pa.int32(),
    "bigint": pa.int64(),
    "double": pa.float64(),
    "timestamp_tz": pa.timestamp("us", tz="UTC"),
}


def arrow_schema(table: str | Contract) -> pa.Schema:
    """The schema of a table of svbatch's own, or of a contract; a column is nullable unless it is `required: true`."""
    contract = read_contract(table) if isinstance(table, str) else table
    return pa.schema(_fields(contract["schema"][0]["properties"]))


def entry_names(contract: Contract) -> tuple[str, list[str]]:
    """The column that lists structs, and their fields' names: how a contract calls entries, items or pairs."""
    columns = contract["schema"][0]["properties"]
    column = next(each for each in columns if each["logicalType"] == "array")
    return column["name"], [field["name"] for field in column["items"]["properties"]]


def table_of(table: str | Contract, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` under the schema of a table of svbatch's own, or of a contract, in their order.

    Every key must be there and none else, in nested structs too; null only where the column is nullable.
    Raises ValueError naming the column, and pyarrow's own errors for a value of another type.
    """
    schema = arrow_schema(table)
    name = table if isinstance(table, str) else table["name"]
    row_field = pa.field(name, pa.struct(list(schema)), nullable=False)
    for row in rows:
        _check(row, row_field, name)
    return pa.Table.from_pylist(rows, schema=schema)


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
