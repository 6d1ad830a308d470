import string
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import T5Tokenizer

from svbatch.errors import TaskError
from svbatch.language.guide import guides
from svbatch.tasks.grammar import grammar_of, spelled
from svbatch.tasks.prompts import answer_text, can_write
from svbatch.tasks.task import Task, load_task

ROOT = Path(__file__).parents[2]
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "svbatch/bundles/mini/tokenizer.json"))


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """Whether an answer may be `text` and end there."""
    end = tokenizer.token_to_id(END)
    [guide] = guides(tokenizer, tokenizer.get_vocab_size(), end, grammar, count=1)
    for token in [*tokenizer.encode(text, add_special_tokens=False).ids, end]:
        if not guide.allowed()[token]:
            return False
        if token != end:
            guide.follow(token)
    return True


def own(folder: Path, text: str) -> Task:
    (folder / "own.yaml").write_text(f"name: own\nversion: 1\ndescription: A test.\ninstructions: [What]\n{text}")
    return load_task("./own.yaml", folder)


@pytest.mark.parametrize(
    ("definition", "right", "wrong"),
    [
        (
            "answer: items\nlimits: {max_items: 2, max_chars: 5}",
            ["none", "a", "tea; cake", "ä b"],
            ["", "a;b", "a; b; c", "coffee", " a", "a; ", "a\nb", "none; "],
        ),
        (
            "answer: pairs\nlabels: [{name: a b, description: x}, {name: 'q\"\\', description: y}]",
            ["none", "a b = 3", 'q"\\ = tea; a b = no sugar'],
            ["", "a = 3", "a b = ", "a b=3", "a b", "a b = x = y"],
        ),
        ("answer: number", ["0", "-7", "12.50", "none"], ["", "07", "1.", "1e9", "1 ", "+1", "1234567890123456"]),
        ("answer: number\nlimits: {whole: true}", ["42", "none"], ["4.2", "42.0"]),
        ("answer: number\nlimits: {minimum: 0}", ["0.333333", "7"], ["0.3333333", "-1", f"0.{'0' * 20}", "1e-3"]),
        (
            "answer: number\nlimits: {whole: true, minimum: 0, maximum: 12}",
            ["0", "12", "none"],
            ["13", "-1", "1.5", "120"],
        ),
        (
            "answer: number\nlimits: {whole: true, minimum: 0}",
            ["0", "999999999999999", "none"],
            ["-1", "1000000000000000", "1 ", "12345678901234567890"],
        ),
        (
            "answer: object\nproperties: {a: {type: string, description: x}, n: {type: integer, description: y}}",
            ['{"a":"tea","n":2}', '{"a":null,"n":null}'],
            ['{"a": "tea","n":2}', '{"n":2,"a":"tea"}', '{"a":"tea"}', '{"a":"","n":2}', '{"a":"tea","n":2,"b":1}'],
        ),
        (
            "answer: object\nproperties: {n: {type: number, description: y}}",
            ['{"n":0.25}', '{"n":-3}'],
            ['{"n":0.3333333}', f'{{"n":0.{"0" * 20}}}', '{"n":1e5}'],
        ),
    ],
)
def test_an_answer_can_only_be_what_its_task_allows(tokenizer, tmp_path, definition, right, wrong):
    grammar = grammar_of(own(tmp_path, definition))
    assert {text: accepts(tokenizer, grammar, text) for text in [*right, *wrong]} == dict.fromkeys(
        right, True
    ) | dict.fromkeys(wrong, False)


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """T5's kind: no bytes, spaces as marks before pieces, and characters that it has no token for."""
    letters = [(letter, -3.0) for letter in string.ascii_letters + string.digits + ".,;=-'_"]
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0), ("▁tea", -1.0), ("▁none", -1.0)]
    return T5Tokenizer(vocab=[*words, *letters], extra_ids=0).backend_tokenizer


@pytest.mark.parametrize("entry", ["keywords", "slots"])
def test_an_llm_whose_spaces_are_marks_before_pieces_is_guided_too(pieces, entry):
    right = ["none", "tea; tea time" if entry == "keywords" else "time = tea time; date = 4 May"]
    wrong = ["none;", "tea;tea", "tea = tea = tea"]
    grammar = grammar_of(load_task(entry, Path()))
    found = {}
    for text in [*right, *wrong]:
        [guide] = guides(pieces, pieces.get_vocab_size() + 28, 1, grammar, count=1)
        assert guide.allowed().nonzero().max() < pieces.get_vocab_size() < len(guide.allowed())
        ids = pieces.encode(text, add_special_tokens=False).ids
        allowed = []
        for token in [*ids, 1]:
            allowed.append(bool(guide.allowed()[token]))
            if not allowed[-1] or token == 1:
                break
            guide.follow(token)
        found[text] = all(allowed)
        assert answer_text(pieces, ids) == text
    assert found == dict.fromkeys(right, True) | dict.fromkeys(wrong, False)


def test_an_answer_is_known_to_be_more_than_an_llm_has_tokens_for(pieces, tokenizer, tmp_path):
    definition = "answer: label\nlabels: [{name: 苦情, description: x}, {name: 満足, description: y}]"
    complaint = spelled(own(tmp_path, definition))
    order = spelled(own(tmp_path, "answer: object\nproperties: {a: {type: string, description: x}}"))
    assert not can_write(pieces, complaint)
    assert not can_write(pieces, order)
    assert can_write(pieces, spelled(load_task("slots", Path())))
    for text in (complaint, order, spelled(load_task("intent", Path()))):
        assert can_write(tokenizer, text)


def test_no_control_token_is_allowed_inside_an_answer(tokenizer):
    grammar = grammar_of(load_task("keywords", Path()))
    [guide] = guides(tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id(END), grammar, count=1)
    control = torch.tensor([tokenizer.token_to_id(t) for t in ("<|im_start|>", "<|endoftext|>", END)])
    assert not guide.allowed()[control].any()


def test_guides_of_one_grammar_go_their_own_ways(tokenizer):
    end = tokenizer.token_to_id(END)
    first, second = guides(tokenizer, tokenizer.get_vocab_size(), end, 'start: "a" | "b"', count=2)
    first.follow(tokenizer.token_to_id("a"))
    assert first.allowed().nonzero().flatten().tolist() == [end]
    assert not second.allowed()[end]


def test_a_grammar_that_cannot_be_read_is_an_error(tokenizer):
    with pytest.raises(TaskError, match="grammar cannot be followed"):
        guides(tokenizer, tokenizer.get_vocab_size(), tokenizer.token_to_id(END), "start: nowhere", count=1)
