from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from svbatch.cli import main
from svbatch.tables.contracts import read_contract
from svbatch.tasks.task import LIBRARY_DIR, library_names

COMPLAINT = """name: complaint
version: 1
description: Whether the caller complains.
answer: yes_no
instructions: [Does the caller complain, yes or no]
"""


def tasks(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["tasks", *map(str, args)])


@pytest.fixture
def complaint(tmp_path) -> Path:
    path = tmp_path / "complaint.yaml"
    path.write_text(COMPLAINT)
    return path


def test_the_library_is_listed_with_what_each_task_answers():
    lines = tasks("list").output.splitlines()
    assert [line.split()[0] for line in lines] == library_names()
    assert any(line.split()[:2] == ["emotion", "label"] for line in lines)


@pytest.mark.parametrize("name", library_names())
def test_every_library_task_is_shown_with_its_columns_and_has_no_mistake(name):
    shown = tasks("show", name)
    assert shown.exit_code == 0
    assert "\ncolumns\n  uri: " in shown.output
    assert tasks("check", LIBRARY_DIR / f"{name}.yaml").exit_code == 0


def test_what_is_shown_of_a_task_names_options_and_labels():
    shown = tasks("show", "translation").output
    assert "  language: " in shown
    assert "; default German" in shown
    assert "  target_lang: " in shown
    assert "  angry: " in tasks("show", "emotion").output


def test_the_contract_of_a_users_task_is_its_answer_types(complaint):
    contract = yaml.safe_load(tasks("schema", complaint).output)
    assert (contract["kind"], contract["name"], contract["description"]["purpose"]) == (
        "DataContract",
        "complaint",
        "Whether the caller complains.",
    )
    names = [column["name"] for column in contract["schema"][0]["properties"]]
    assert names[5:-3] == ["answer", "probability", "reason", "calibrated"]


def test_the_contract_of_a_library_task_is_the_one_that_is_shipped():
    assert yaml.safe_load(tasks("schema", "keyword_search").output) == read_contract("keyword_search")


def test_a_right_task_is_said_to_be_right(complaint):
    result = tasks("check", complaint)
    assert (result.exit_code, result.output) == (0, "1 task without a mistake\n")


def test_every_mistake_of_every_file_has_its_line(complaint, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(COMPLAINT.replace("version: 1", "versoin: 1"))
    complaint.write_text(COMPLAINT.replace("yes_no", "yes_mo") + "max_tokens: 0\n")
    result = tasks("check", complaint, other)
    assert result.exit_code == 2
    for message in (
        "complaint.yaml, line 4: `answer` is `yes_mo`; choose text, label",
        "complaint.yaml, line 6: `max_tokens` is 0",
        "other.yaml, line 2: unknown key `versoin`; did you mean `version`?",
    ):
        assert message in result.output


def test_an_unknown_task_is_refused_with_the_nearest():
    result = tasks("show", "emotions")
    assert "unknown task `emotions`; did you mean `emotion`?" in str(result.exception)


def test_a_name_of_the_library_is_taken(complaint):
    complaint.write_text(COMPLAINT.replace("name: complaint", "name: intent"))
    result = tasks("check", complaint)
    assert (result.exit_code, "`intent` is a task of the library; choose another name" in result.output) == (2, True)
