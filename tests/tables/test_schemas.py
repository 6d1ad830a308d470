import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from svbatch.tables.contracts import table_names
from svbatch.tables.schemas import arrow_schema, table_of

ROOT = Path(__file__).parents[2]
TABLES = [
    "asr",
    "keyword_search",
    "keywords",
    "translation",
    "slots",
    "speech_activity",
    "recordings",
    "failures",
    "runs",
    "forgotten",
    "scan",
]
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
SAID = {"keyword": "refund", "present": True, "probability": 0.9, "start": 1.5}
SEARCHED = {
    "uri": "/a.wav", "recording_id": "00", "channel": None, "start": 0.0, "end": 2.0, "keywords": [SAID],
    "calibrated": False, "task_version": "v", "run_id": "r", "annotated_at": WHEN,
}  # fmt: skip


def test_there_is_one_contract_per_table():
    assert table_names() == set(TABLES)


@pytest.mark.parametrize("table", TABLES)
def test_a_contract_describes_every_column_and_says_whether_it_may_be_null(table):
    contract = yaml.safe_load((ROOT / "schemas" / f"{table}.odcs.yaml").read_text())
    assert (contract["apiVersion"], contract["kind"], contract["name"]) == ("v3.1.0", "DataContract", table)
    assert [each["name"] for each in contract["schema"]] == [table]
    open_properties = list(contract["schema"][0]["properties"])
    while open_properties:
        column = open_properties.pop()
        assert column["description"].endswith(".")
        assert column["required"] in (True, False)
        open_properties += column.get("items", {}).get("properties", [])


@pytest.mark.parametrize("table", TABLES)
def test_a_contract_names_its_key(table):
    contract = yaml.safe_load((ROOT / "schemas" / f"{table}.odcs.yaml").read_text())["schema"][0]
    columns = {each["name"]: each for each in contract["properties"]}
    primary_key = [name for name, column in columns.items() if column.get("primaryKey")]
    unique = [name for rule in contract.get("quality", []) for name in rule["arguments"]["properties"]]
    assert primary_key or unique
    assert set(primary_key + unique) <= set(columns)


@pytest.mark.parametrize("table", ["asr", "keyword_search", "speech_activity"])
def test_the_tables_of_tasks_share_the_common_columns(table):
    common = {
        "uri": pa.string(), "recording_id": pa.string(), "channel": pa.int32(), "start": pa.float64(),
        "end": pa.float64(), "task_version": pa.string(), "run_id": pa.string(),
        "annotated_at": pa.timestamp("us", tz="UTC"),
    }  # fmt: skip
    schema = arrow_schema(table)
    assert {name: schema.field(name).type for name in common} == common
    assert [name for name in common if schema.field(name).nullable] == ["channel"]


def test_an_array_of_objects_is_a_list_of_structs():
    words = arrow_schema("asr").field("words")
    assert words.nullable
    assert words.type == pa.list_(
        pa.struct([pa.field(name, kind, nullable=False) for name, kind in
                   [("word", pa.string()), ("start", pa.float64()), ("end", pa.float64())]])
    )  # fmt: skip
    assert arrow_schema("recordings").field("answered").type == pa.list_(pa.string())


def test_rows_come_back_as_they_went_in():
    table = table_of("keyword_search", [SEARCHED, {**SEARCHED, "keywords": []}])
    assert table.schema == arrow_schema("keyword_search")
    assert table.to_pylist() == [SEARCHED, {**SEARCHED, "keywords": []}]
    assert table_of("keyword_search", []).schema == arrow_schema("keyword_search")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SEARCHED, "colour": 1}, "keyword_search: unknown colour"),
        ({key: SEARCHED[key] for key in SEARCHED if key not in ("uri", "end")}, "_search: no uri, no end"),
        ({**SEARCHED, "uri": None}, "keyword_search.uri: null"),
        ({**SEARCHED, "keywords": [{**SAID, "end": 1.0}]}, "keyword_search.keywords: unknown end"),
        ({**SEARCHED, "keywords": [{"keyword": "a"}]}, "keyword_search.keywords: no present"),
        ({**SEARCHED, "keywords": [{**SAID, "probability": None}]}, "keyword_search.keywords.probability: null"),
    ],
)  # fmt: skip
def test_a_row_with_unknown_missing_or_null_columns_is_refused_by_name(row, message):
    with pytest.raises(ValueError, match=message):
        table_of("keyword_search", [row])


def test_a_value_of_another_type_is_refused():
    with pytest.raises(pa.ArrowInvalid):
        table_of("keyword_search", [{**SEARCHED, "start": "soon"}])


def test_the_contracts_are_found_when_installed_as_a_package(tmp_path):
    shutil.copytree(ROOT / "svbatch" / "tables", tmp_path / "svbatch" / "tables")
    shutil.copytree(ROOT / "schemas", tmp_path / "svbatch" / "schemas")
    shutil.copy(ROOT / "svbatch" / "__init__.py", tmp_path / "svbatch")
    command = "from svbatch.tables import schemas as s; print(s.__file__, s.arrow_schema('asr').names[0])"
    printed = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.split() == [str(tmp_path / "svbatch/tables/schemas.py"), "uri"]
