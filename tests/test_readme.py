"""What the README tells a reader to type, typed. Its quickstart runs in test_mini.py, being slow."""

import os
import re
import shutil
from pathlib import Path

import click
import duckdb
import polars as pl
import pytest

from svbatch.bundle import Bundle
from svbatch.cli import main
from svbatch.job import load_job
from svbatch.run import run
from svbatch.training.data import read_manifest
from svbatch.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPLAINT = """
name: complaint
version: 1
description: Whether the caller complains.
answer: label
instructions: ["Does the caller complain? Answer one of {{ labels }}."]
labels:
  - {name: complains, description: something went wrong}
  - {name: content, description: nothing did}
"""


def block(language: str) -> str:
    [found] = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def answered(corpus_dir, tiny_bundle: Bundle, tmp_path_factory) -> Path:
    """A folder with the README's job, answered by the tiny model."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(corpus_dir, folder / "recordings")
    (folder / "complaint.yaml").write_text(COMPLAINT)
    (folder / "job.yaml").write_text(block("yaml") + f"bundle: {tiny_bundle.folder}\n")
    outcome = run(load_job(folder / "job.yaml"), cache=tiny_bundle.cache, quiet=True)
    assert outcome.exit_code == 0
    return folder


def test_the_job_writes_a_table_for_each_of_its_tasks(answered):
    tables = {path.parent.name for path in (answered / "out").glob("*/_delta_log")}
    tasks = {"asr", "keyword_search", "legal", "speech_activity", "complaint"}
    assert tables == tasks | {"recordings", "failures", "runs"}


def test_the_polars_lines_read_the_words(answered, monkeypatch):
    monkeypatch.chdir(answered)
    names: dict[str, pl.DataFrame] = {}
    exec(block("python"), names)
    assert names["words"].columns == ["uri", "word", "start", "end"]
    assert len(names["words"]) > 0


def test_the_duckdb_query_reads_the_keywords(answered, monkeypatch):
    monkeypatch.chdir(answered)
    assert duckdb.sql(block("sql")).columns == ["uri", "start", "keyword", "said_at"]


def test_the_manifest_line_is_read(tmp_path):
    (tmp_path / "train.jsonl").write_text(block("json"))
    [example] = read_manifest(tmp_path / "train.jsonl")
    assert (example.lang, example.speaker, example.labels) == ("en", "c17", {"speech": True})


def commands() -> list[list[str]]:
    """The words after `svbatch` of every command in the README, in a block or between backticks."""
    prompt = r"^svbatch ((?:run|train|bundle) .+)$|`svbatch ([^`]+)`|&& svbatch (.+)$"
    named = re.findall(prompt, README, re.MULTILINE)
    return [re.split(r"\s+", "".join(groups).split("  #")[0]) for groups in named]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_exists_with_its_options(words):
    context = click.Context(main, info_name="svbatch")
    command: click.Command = main
    while isinstance(command, click.Group):
        found = command.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]}"
        command, words = found, words[1:]
    options = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options | {"--help"}


def test_the_recipe_and_the_job_that_it_names_are_there():
    assert load_recipe(ROOT / "jobs" / "train" / "mini.yaml").name == "mini"
    assert load_job(ROOT / "jobs" / "quickstart.yaml").corpus


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_somewhere(path):
    assert os.path.lexists(ROOT / path)
