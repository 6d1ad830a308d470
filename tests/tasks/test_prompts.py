import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from svbatch.errors import TaskError
from svbatch.tasks.prompts import (
    answer_ids,
    answer_text,
    end_id,
    opening_ids,
    placeholders,
    question_ids,
    render,
    transcript_ids,
)

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def make_tokenizer():
    """A byte-level BPE of the LLM's kind: 0 to 2 are control tokens, then the bytes, then a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Write down what is said.", "user Transcript: yes no"] * 9, trainer)
    return tokenizer


TOKENIZER = make_tokenizer()


def spelled(ids):
    """Ids as text, with the control tokens written out."""
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_prompt_is_one_user_turn_without_a_system_turn():
    ids = [
        *opening_ids(TOKENIZER),
        *transcript_ids(TOKENIZER, "so I would"),
        *question_ids(TOKENIZER, "What?"),
        *answer_ids(TOKENIZER, "yes"),
    ]
    assert spelled(ids) == (
        "<|im_start|>user\n\nTranscript: so I would\nWhat?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_control_tokens_are_ids_and_the_end_of_the_turn_is_the_last():
    assert opening_ids(TOKENIZER)[0] == 1
    assert answer_ids(TOKENIZER, "yes")[-1] == end_id(TOKENIZER) == 2
    assert answer_ids(TOKENIZER, "") == [2]


@pytest.mark.parametrize("control", CONTROL)
def test_an_instruction_cannot_open_or_close_a_turn(control):
    plain = [i for i in question_ids(TOKENIZER, "x") if i <= 2]
    assert [i for i in question_ids(TOKENIZER, f"x{control} y") if i <= 2] == plain == [2, 1]
    assert all(i > 2 for i in transcript_ids(TOKENIZER, f"x {control}y{control}"))
    assert [i for i in answer_ids(TOKENIZER, control) if i <= 2] == [2]


def test_control_text_survives_as_text():
    assert answer_text(TOKENIZER, answer_ids(TOKENIZER, "a <|im_end|> b")) == "a <|im_end|> b"


def test_a_tokenizer_that_was_told_otherwise_still_encodes_control_text_as_text():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.encode_special_tokens = False
    assert 2 not in transcript_ids(tokenizer, "<|im_end|>")


@settings(deadline=None)
@given(TEXT)
def test_no_text_gives_a_control_id_and_every_answer_comes_back(text):
    assert min([3, *answer_ids(TOKENIZER, text)[:-1]]) > 2
    assert answer_text(TOKENIZER, answer_ids(TOKENIZER, text)) == text


@settings(deadline=None)
@given(TEXT)
def test_a_transcript_is_one_line(text):
    assert spelled(transcript_ids(TOKENIZER, text)).count("\n") == 1


def test_an_empty_transcript_keeps_its_heading():
    assert spelled(transcript_ids(TOKENIZER, "")) == "\nTranscript:"
    assert spelled(transcript_ids(TOKENIZER, " \n")) == "\nTranscript:"


def test_half_a_character_decodes_to_the_replacement_character():
    assert answer_text(TOKENIZER, answer_ids(TOKENIZER, "é")[:1]) in ("é", "�")


def test_render_fills_in_values_that_are_never_read_as_templates():
    assert render('Is "{{ word }}" said?', {"word": "{{ 7 * 7 }} <b>&"}) == 'Is "{{ 7 * 7 }} <b>&" said?'


def test_a_placeholder_without_a_value_is_refused():
    with pytest.raises(TaskError, match="no value for word; known: keyword"):
        render("Is {{ word }} said?", {"keyword": "x"})


def test_placeholders_are_found():
    assert placeholders("{{ a }} and {{b}}, {{ a }}") == {"a", "b"}
    assert placeholders("none } { here %}") == set()


@pytest.mark.parametrize(
    "wording",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ x.__class__ }}",
        "{{ x | upper }}",
        "{% for i in range(9) %}x{% endfor %}",
        "{% if x %}",
        "{{ x",
        "{{ 7 }}",
        "{% include 'x' %}",
        "{% set x = 1 %}",
        "{{ " + "(" * 5000,
    ],
)
def test_a_wording_is_text_and_names_and_nothing_else(wording):
    with pytest.raises(TaskError, match=r"a wording holds text and \{\{ name \}\} only"):
        placeholders(wording)


@settings(deadline=None)
@given(st.text(st.sampled_from("{}%# ax'(")))
def test_any_wording_renders_or_is_refused(wording):
    try:
        names = placeholders(wording)
    except TaskError:
        return
    assert isinstance(render(wording, dict.fromkeys(names, "v")), str)


def test_without_turns_a_question_and_an_answer_each_end_with_the_end_of_text():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str().replace("<|im_start|>", "<pad>").replace("<|im_end|>", "</s>"))
    assert opening_ids(tokenizer) == []
    assert end_id(tokenizer) == tokenizer.token_to_id("</s>")
    question = question_ids(tokenizer, "Which word?")
    assert question[-1] == end_id(tokenizer)
    assert answer_text(tokenizer, question) == "\nWhich word?"
    assert answer_ids(tokenizer, "refund")[-1] == end_id(tokenizer)


def test_a_tokenizer_of_neither_format_is_refused():
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str().replace("<|im_start|>", "<pad>").replace("<|im_end|>", "<end>"))
    with pytest.raises(TaskError, match="has no </s>; prompts are in SmolLM2's chat format, or in T5's"):
        question_ids(tokenizer, "Which word?")
