"""docs/tasks.md: its examples are tasks without a mistake, and it lists what there is."""

import re
from pathlib import Path

import pytest

from svbatch.contract import contract_of
from svbatch.tasks.definition import Definition
from svbatch.tasks.task import bare_task, library_names

DOCS = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_is_a_task_with_a_table(example, tmp_path):
    (tmp_path / "own.yaml").write_text(example)
    assert contract_of(bare_task("./own.yaml", tmp_path))["name"] == bare_task("./own.yaml", tmp_path).name


def test_every_task_of_the_library_and_every_key_is_listed():
    listed = set(re.findall(r"`(\w+)`", DOCS))
    assert listed >= set(library_names())
    assert listed >= set(Definition.model_fields)


@pytest.mark.parametrize("name", library_names())
def test_the_columns_of_every_library_task_are_listed(name):
    columns = [column["name"] for column in contract_of(bare_task(name, Path()))["schema"][0]["properties"]]
    assert set(re.findall(r"`(\w+)`", DOCS)) >= set(columns[5:-3])
