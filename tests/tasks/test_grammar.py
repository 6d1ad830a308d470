import json
import math
from pathlib import Path

import pytest

from svbatch.errors import TaskError
from svbatch.tasks.grammar import Said, grammar_of, parse_items, parse_number, parse_object, parse_pairs
from svbatch.tasks.task import Task, load_task

NUMBER = "answer: number\ninstructions: [How many]\n"
OBJECT = """answer: object
instructions: ["What is ordered?"]
properties:
  dish: {type: string, description: what}
  size: {type: string, description: how large, enum: [small, large]}
  count: {type: integer, description: how many}
  price: {type: number, description: euros}
  to_go: {type: boolean, description: whether it is taken away}
  extras: {type: array, description: besides, items: {type: string, description: one of them}}
  who: {type: object, description: the guest, properties: {name: {type: string, description: name}}}
"""


def write(folder: Path, text: str, name: str = "own") -> str:
    (folder / f"{name}.yaml").write_text(f"name: {name}\nversion: 1\ndescription: A test.\n{text}", encoding="utf-8")
    return f"./{name}.yaml"


def load(folder: Path, text: str) -> Task:
    return load_task(write(folder, text), folder)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(TaskError) as caught:
        load(folder, text)
    return str(caught.value)


def said(text: str, probability: float = 0.5) -> Said:
    """Every character a token."""
    return Said(text, range(1, len(text) + 1), [math.log(probability)] * len(text))


def test_items_are_read_back_without_repeats_each_with_its_score():
    answer = said("red; green; red")
    assert parse_items(answer) == [("red", pytest.approx(0.5)), ("green", pytest.approx(0.5))]
    assert parse_items(said("none")) == []


def test_a_score_is_that_of_the_items_own_tokens():
    answer = Said("ab; c", [2, 4, 5], [math.log(0.9), math.log(0.1), math.log(0.4)])
    assert parse_items(answer) == [("ab", pytest.approx(0.9)), ("c", pytest.approx(0.4))]


def test_a_token_that_holds_parts_of_two_items_counts_for_both():
    answer = Said("a; b", [3, 4], [math.log(0.25), math.log(1.0)])
    assert parse_items(answer) == [("a", pytest.approx(0.25)), ("b", pytest.approx(1.0))]


def test_pairs_are_read_back_with_the_values_score():
    answer = Said("day = to day", [6, 12], [math.log(0.1), math.log(0.8)])
    assert parse_pairs(answer) == [("day", "to day", pytest.approx(0.8))]
    assert parse_pairs(said("none")) == []


@pytest.mark.parametrize(("text", "value"), [("-12", -12), ("3.50", 3.5), ("0", 0), ("none", None)])
def test_a_number_is_read_back(text, value):
    assert parse_number(said(text)) == (value, pytest.approx(0.5))


def test_an_object_is_read_back():
    assert parse_object(said('{"a":null}')) == ({"a": None}, pytest.approx(0.5))


def test_the_schema_of_an_object_is_closed_bounded_and_lets_every_property_be_null(tmp_path):
    grammar = grammar_of(load(tmp_path, OBJECT))
    schema = json.loads(grammar.removeprefix("start: %json "))
    assert schema["additionalProperties"] is False
    assert schema["required"] == list(schema["properties"])
    assert all(prop["anyOf"][1] == {"type": "null"} for prop in schema["properties"].values())
    assert schema["properties"]["dish"]["anyOf"][0]["maxLength"] == 60
    assert schema["properties"]["size"]["anyOf"][0] == {"enum": ["small", "large"]}


def test_any_text_is_an_answer_of_type_text():
    assert grammar_of(load_task({"question": {"question": "Who calls?"}}, Path())) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NUMBER + "limits: {max_items: 3}", "line 6: an answer of type number has no `max_items`; leave it out"),
        (NUMBER + "limits: {minimum: 3, maximum: 2}", "3 is above the maximum, 2"),
        (NUMBER + "limits: {minimun: 3}", "unknown key `minimun`; did you mean `minimum`?"),
        (NUMBER + "properties: {a: {type: string, description: x}}", "`properties` go with an answer of type object"),
        (OBJECT.split("properties")[0], "`properties` go with an answer of type object"),
        (OBJECT + "  bad: {$ref: '#', description: x}", "unknown key `$ref`; known: type"),
        (OBJECT + "  bad: {type: array, description: x}", "`items` go with type array"),
        (OBJECT + "  bad: {type: object, description: x}", "`properties` go with type object"),
        (OBJECT + "  bad: {type: integer, description: x, enum: [a]}", "`enum` goes with type string"),
        (OBJECT + "  bad: {type: string, description: x, enum: [a, A]}", "`A` stands twice; keep one"),
        (OBJECT + "  bad: {type: text, description: x}", "choose string, integer, number"),
        (OBJECT + "  bad: &bad {type: array, description: x, items: *bad}", "an alias (*); write the value out"),
        (NUMBER + "limits: {whole: true, minimum: 1.2, maximum: 1.8}", "no whole number lies between 1.2 and 1.8"),
        (NUMBER + "limits: {minimum: .nan}", "limits.minimum"),
        (NUMBER + "limits: {maximum: 10000000000000000000}", "limits.maximum"),
        (OBJECT + "  bad: {type: string, description: x, enum: []}", "an empty list; write the choices"),
        (
            NUMBER
            + "each: kinds\nparameters: [{name: kinds, type: texts, description: x, required: true, entry: kind}]",
            "one question for each entry is asked by a task of answer yes_no",
        ),
        (
            "answer: text\ninstructions: ['{{ labels }}']\n"
            "parameters: [{name: labels, type: text, description: x, default: y}]",
            "in a wording `labels` means the task's own labels; choose another name",
        ),
        (
            "answer: label\ninstructions: [What]\nlabels: [{name: a, description: x}, {name: b, description: x}]\n"
            "parameters: [{name: kinds, type: labels, description: x, default: y}]",
            "a parameter of type labels has no default; leave it out",
        ),
        ("answer: text\ninstructions: [What]\nscope: window", "windows are heard, not transcribed"),
        (
            "answer: text\ninstructions: [What]\n"
            "parameters: [{name: a, type: text, description: x, default: y, column: c}, "
            "{name: b, type: text, description: x, default: y, column: c}]",
            "another parameter has the column `c` too",
        ),
        ("answer: pairs\ninstructions: [What]\n", "0 labels; an answer of type pairs needs at least 1"),
        (
            "answer: pairs\ninstructions: [What]\nlabels: [{name: 'a = b', description: x}]",
            "the label `a = b` holds a `;`, `=` or line break, which part pairs",
        ),
        (
            "answer: labels\ninstructions: ['Which of {{ labels }}?']\nlabels: [{name: a, description: x}]",
            "{{ label }} is missing: the question is asked once per label",
        ),
        (
            "answer: items\ninstructions: [What]\nparameters: [{name: kinds, type: labels, description: x}]",
            "an answer of type items has no labels; leave the parameter out",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_with_its_line(tmp_path, text, message):
    found = refusal(tmp_path, text)
    assert message in found
    assert "own.yaml" in found


def test_an_object_nested_too_deeply_is_refused(tmp_path):
    deep = "{type: string, description: x}"
    for _ in range(9):
        deep = f"{{type: object, description: x, properties: {{a: {deep}}}}}"
    assert refusal(tmp_path, OBJECT + f"  deep: {deep}").count("nested more than 4 deep") == 1
    lines = "{type: array, description: x, items: {type: string, description: y}}"
    listed = f"{{type: array, description: x, items: {{type: object, description: y, properties: {{items: {lines}}}}}}}"
    assert load(tmp_path, OBJECT + f"  listed: {listed}").properties["listed"].items is not None


def test_numbers_are_bounded_so_that_every_one_fits_its_column(tmp_path):
    largest = 10**15 - 1
    grammar = grammar_of(load(tmp_path, NUMBER + "limits: {whole: true, minimum: 0}"))
    assert f'"maximum": {largest}' in grammar
    schema = json.loads(grammar_of(load(tmp_path, OBJECT)).removeprefix("start: %json "))
    assert schema["properties"]["count"]["anyOf"][0] == {"type": "integer", "minimum": -largest, "maximum": largest}


def test_a_task_of_labels_asks_each_of_them_alone(tmp_path):
    text = (
        "answer: labels\ninstructions: ['Is it {{ label }} ({{ label_description }})?']\n"
        "labels: [{name: a, description: first}, {name: b, description: second}]"
    )
    task = load(tmp_path, text)
    assert task.questions() == ("Is it a (first)?", "Is it b (second)?")
    assert (task.entries, task.scored) == (("a", "b"), ("yes", "no"))
