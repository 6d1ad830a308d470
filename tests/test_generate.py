"""Generated answers of every type, by a random model: they mean nothing, and are what their contracts say."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from svbatch.annotate import Annotated, annotate
from svbatch.contract import contract_of
from svbatch.corpus.sources import recording_at
from svbatch.errors import TaskError
from svbatch.language.guide import Guide
from svbatch.tables.schemas import arrow_schema
from svbatch.tasks.task import Task, load_task, task_version

HEAD = "version: 1\ndescription: A test.\ninstructions: ['What?']\n"
LABELS = "labels: [{name: red, description: warm}, {name: blue, description: cold}]\n"
TYPES = {
    "text": "answer: text\nmax_tokens: 12\n",
    "label": f"answer: label\n{LABELS}",
    "labels": f"answer: labels\n{LABELS}",
    "yes_no": "answer: yes_no\n",
    "number": "answer: number\nlimits: {minimum: 0, maximum: 99}\nmax_tokens: 40\n",
    "whole": "answer: number\nlimits: {whole: true, minimum: 0, maximum: 99}\nmax_tokens: 40\n",
    "items": "answer: items\nlimits: {max_items: 3, max_chars: 4}\nmax_tokens: 80\n",
    "pairs": f"answer: pairs\n{LABELS}limits: {{max_items: 2, max_chars: 4}}\nmax_tokens: 80\n",
    "object": "answer: object\nmax_tokens: 80\nproperties:\n  paid: {type: boolean, description: whether}\n"
    "  how: {type: string, description: by what, enum: [card, cash]}\n",
}


def own(folder: Path, name: str, text: str) -> Task:
    head = HEAD.replace("What?", "Is it {{ label }}?") if "answer: labels" in text else HEAD
    (folder / f"{name}.yaml").write_text(f"name: own_{name}\n{head}{text}")
    return load_task(f"./{name}.yaml", folder)


def answered(tasks: list[Task], corpus_dir: Path, model) -> Annotated:
    versions = {task.name: task_version(task, "tiny", {}) for task in tasks}
    return annotate([recording_at(corpus_dir / "short.flac")], tasks, versions, model, "run")


@pytest.fixture(scope="module")
def everything(tmp_path_factory, corpus_dir, tiny_model) -> Annotated:
    folder = tmp_path_factory.mktemp("tasks")
    return answered([own(folder, name, text) for name, text in TYPES.items()], corpus_dir, tiny_model)


@pytest.mark.parametrize("name", TYPES)
def test_every_question_has_a_row_or_a_failure(everything, name):
    failed = [row for row in everything.failures.to_pylist() if row["task"] == f"own_{name}"]
    assert everything.answers[f"own_{name}"].num_rows + len(failed) == 1
    for row in failed:
        assert (row["stage"], row["code"] in ("token_limit", "loop")) == ("answer", True)
        assert row["recording_id"]
        assert row["end"] > row["start"]
        assert re.fullmatch(r"task own_\w+: the answer was not complete after \d+ of \d+ tokens", row["message"])
    assert everything.num_unanswered == len(everything.failures)


def test_short_grammars_are_answered_even_by_a_random_model(everything):
    for name in ("label", "labels", "yes_no", "whole", "object", "text"):
        assert everything.answers[f"own_{name}"].num_rows == 1, name


def test_answers_are_typed_by_their_answer_type(everything):
    [whole] = everything.answers["own_whole"].to_pylist()
    assert whole["value"] is None or 0 <= whole["value"] <= 99
    assert everything.answers["own_whole"].schema.field("value").type == pa.int64()
    assert everything.answers["own_number"].schema.field("value").type == pa.float64()
    [thing] = everything.answers["own_object"].to_pylist()
    assert thing["object"]["paid"] in (True, False, None)
    assert thing["object"]["how"] in ("card", "cash", None)
    assert 0 <= thing["score"] <= 1
    [each] = everything.answers["own_labels"].to_pylist()
    assert [entry["label"] for entry in each["labels"]] == ["red", "blue"]
    [yes_no] = everything.answers["own_yes_no"].to_pylist()
    assert yes_no["answer"] == (yes_no["probability"] >= 0.5)


def test_an_answer_cut_at_its_limit_is_a_failure_and_no_row(tmp_path, corpus_dir, tiny_model):
    text = TYPES["object"].replace("max_tokens: 80", "max_tokens: 3")
    annotated = answered([own(tmp_path, "object", text)], corpus_dir, tiny_model)
    [row] = annotated.failures.to_pylist()
    assert (row["task"], row["code"]) == ("own_object", "token_limit")
    assert annotated.answers["own_object"].num_rows == 0
    assert annotated.recordings["answered"].to_pylist() == [[f"own_object@{row['task_version']}"]]


@pytest.mark.parametrize("method", ["allowed", "follow"])
def test_an_answer_whose_guide_is_lost_on_the_way_is_a_failure_and_not_the_end(
    tmp_path, corpus_dir, tiny_model, monkeypatch, method
):
    """A parser has limits of its own, which no check before the run can know."""
    steps = iter(range(4))
    whole = getattr(Guide, method)

    def lost(guide, *arguments):
        if next(steps, None) is None:
            raise TaskError("the answer's grammar cannot be followed: too many items")
        return whole(guide, *arguments)

    task = own(tmp_path, "object", TYPES["object"])
    monkeypatch.setattr(Guide, method, lost)
    annotated = answered([task, load_task("emotion", Path())], corpus_dir, tiny_model)
    [row] = annotated.failures.to_pylist()
    assert (row["task"], row["code"]) == ("own_object", "grammar")
    assert annotated.answers["emotion"].num_rows == 1


@pytest.mark.parametrize("name", ["translation", "question", "keywords", "slots", "emotion", "intent"])
def test_a_library_task_is_answered_under_its_contract(name, corpus_dir, tiny_model):
    entry = {"question": {"question": "Who calls?"}} if name == "question" else name
    task = load_task(entry, Path()).model_copy(update={"max_tokens": 8} if name in ("translation", "question") else {})
    annotated = answered([task], corpus_dir, tiny_model)
    table = annotated.answers[name]
    assert table.num_rows + annotated.num_unanswered == 1
    own = {
        "translation": ["target_lang", "text", "transcript", "num_tokens", "avg_logprob", "finish_reason"],
        "question": ["question", "text", "num_tokens", "avg_logprob", "finish_reason"],
        "keywords": ["keywords"],
        "slots": ["slots"],
    }.get(name, ["label", "probability", "probabilities", "reason", "calibrated"])
    assert table.schema.names[5:-3] == own
    if name == "translation":
        assert table["target_lang"].to_pylist() == ["German"]
        assert table["transcript"].to_pylist() == [None], "the recogniser's, in the table asr"
    if name == "question":
        assert table["question"].to_pylist() == ["Who calls?"]


def test_a_translation_has_the_transcript_that_the_llm_wrote_where_there_is_no_recogniser(corpus_dir, tiny_model):
    tasks = [load_task(name, Path()) for name in ("asr", "translation")]
    short = [task.model_copy(update={"max_tokens": 8}) for task in tasks]
    annotated = answered(short, corpus_dir, replace(tiny_model, recogniser=None))
    [said], [translated] = (annotated.answers[name].to_pylist() for name in ("asr", "translation"))
    assert translated["transcript"] == said["text"]


def test_the_names_of_keywords_and_slots_are_those_of_their_contracts():
    assert arrow_schema("keywords").field("keywords").type.value_field.type.names == ["keyword", "score"]
    assert arrow_schema("slots").field("slots").type.value_field.type.names == ["slot", "value", "score"]


def test_a_parameter_cannot_take_a_column_that_is_there(tmp_path):
    text = TYPES["text"] + "parameters: [{name: x, type: text, description: y, default: z, column: uri}]\n"
    with pytest.raises(TaskError, match="`uri` is a column of every such table"):
        contract_of(own(tmp_path, "text", text))


def test_a_whole_recording_has_one_row_made_of_its_segments(tmp_path, corpus_dir, tiny_model):
    """twice.wav has two segments, in which the labels' probabilities differ."""
    text = TYPES["label"]
    whole, parts = own(tmp_path, "whole", text + "scope: recording\n"), own(tmp_path, "parts", text)
    recording = recording_at(corpus_dir / "twice.wav")
    annotated = annotate([recording], [whole, parts], {"own_whole": "1", "own_parts": "2"}, tiny_model, "run")
    first, second = annotated.answers["own_parts"].to_pylist()
    [row] = annotated.answers["own_whole"].to_pylist()
    assert (row["start"], row["end"]) == (0.0, annotated.recordings["duration"].to_pylist()[0])
    weights = [part["end"] - part["start"] for part in (first, second)]
    means = np.average(
        [[p["probability"] for p in part["probabilities"]] for part in (first, second)], axis=0, weights=weights
    )
    assert [p["probability"] for p in row["probabilities"]] == pytest.approx(list(means), abs=1e-6)
