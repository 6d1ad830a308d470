"""docs/tables.md has every table and column as schemas/ says; `python tests/tables/test_docs.py` writes them anew."""

import re
from pathlib import Path

import click
import pytest

from svbatch.cli import COMMANDS, main
from svbatch.errors import BusyError, DamageError, SvbatchError
from svbatch.tables.contracts import read_contract, table_names

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"
ORDER = ["recordings", "failures", "runs", "forgotten"]
TYPES = {
    "varchar": "text", "boolean": "boolean", "integer": "int32", "bigint": "int64", "double": "float64",
    "timestamp_tz": "timestamp, UTC",
}  # fmt: skip
START, END = "<!-- from schemas/: start -->\n", "<!-- end -->"


def columns(properties, stem=""):
    for column in properties:
        name = stem + column["name"]
        yield name, type_of(column), "yes" if column["required"] else "no", column["description"]
        inner = column.get("items", column).get("properties", [])
        yield from columns(inner, f"{name}[]." if column["logicalType"] == "array" else f"{name}.")


def type_of(column):
    if column["logicalType"] == "array":
        return f"list of {type_of(column['items'])}"
    return "struct" if column["logicalType"] == "object" else TYPES[column["physicalType"]]


def rendered():
    tables = [*ORDER, *sorted(table_names() - set(ORDER))]
    parts = []
    for table in tables:
        contract = read_contract(table)
        parts.append(f"### {table}\n\n{contract['description']['purpose']}")
        if limits := contract["description"].get("limitations"):
            parts[-1] += f" {limits}"
        rows = [f"| `{name}` | {kind} | {never_null} | {said} |" for name, kind, never_null, said in
                columns(contract["schema"][0]["properties"])]  # fmt: skip
        parts.append("| column | type | never null | meaning |\n|---|---|---|---|\n" + "\n".join(rows))
    return START + "\n" + "\n\n".join(parts) + "\n\n" + END


def test_every_table_and_column_is_there_as_its_contract_says():
    assert rendered() in PAGE.read_text(encoding="utf-8"), "python tests/tables/test_docs.py writes them anew"


def test_every_exit_code_is_in_the_one_table():
    listed = {int(code) for code in re.findall(r"^\| (\d+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)}
    assert listed >= {0, 1, 3, SvbatchError.exit_code, DamageError.exit_code, BusyError.exit_code, 130}


@pytest.mark.parametrize("name", ["status", "verify", "compact", "forget", "migrate"])
def test_every_command_that_looks_after_an_output_is_shown(name):
    assert name in COMMANDS
    assert f"svbatch {name} " in PAGE.read_text(encoding="utf-8")
    command = main.get_command(click.Context(main), name)
    assert "Example:" in command.help


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page[: page.index(START)] + rendered() + page[page.index(END) + len(END) :], encoding="utf-8")
