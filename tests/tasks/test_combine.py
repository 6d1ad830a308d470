import math
from pathlib import Path

import pytest

from svbatch.errors import TaskError
from svbatch.tasks.combine import combined
from svbatch.tasks.task import Task, load_task


def own(folder: Path, text: str) -> Task:
    head = "name: own\nversion: 1\ndescription: A test.\nscope: recording\n"
    (folder / "own.yaml").write_text(head + text)
    return load_task({"./own.yaml": {"words": ["a", "b"]} if "words" in text else {}}, folder)


def yes(probability: float) -> dict[str, object]:
    return {"answer": probability >= 0.5, "probability": probability, "reason": None, "calibrated": True}


def entries(*probabilities: float, start: float) -> dict[str, object]:
    listed = [
        {"keyword": word, "present": p >= 0.5, "probability": p, "start": start if p >= 0.5 else None}
        for word, p in zip("ab", probabilities, strict=True)
    ]
    return {"keywords": listed, "calibrated": True}


YES_NO = "answer: yes_no\ninstructions: [Is it]\n"
WORDS = (
    "answer: yes_no\neach: words\ninstructions: ['Is {{ word }} said?']\n"
    "parameters: [{name: words, type: texts, description: x, required: true, entry: word}]\n"
)


def test_labels_are_averaged_over_time(tmp_path):
    task = own(
        tmp_path,
        "answer: label\ninstructions: [What]\nmin_probability: 0.7\n"
        "labels: [{name: a, description: x}, {name: b, description: y}]\n",
    )
    parts = [
        {"probabilities": [{"label": "a", "probability": p}, {"label": "b", "probability": 1 - p}], "calibrated": c}
        for p, c in ((0.9, True), (0.3, False))
    ]
    strong = combined(task, parts, [9.0, 1.0])
    assert (strong["label"], strong["probability"], strong["calibrated"]) == ("a", pytest.approx(0.84), False)
    assert combined(task, parts, [1.0, 1.0])["reason"] == "low_confidence"


def test_any_segment_can_say_yes_and_a_mean_needs_most(tmp_path):
    parts, lengths = [yes(0.1), yes(0.8)], [9.0, 1.0]
    found = combined(own(tmp_path, YES_NO), parts, lengths)
    assert (found["answer"], found["probability"]) == (True, pytest.approx(0.8))
    found = combined(own(tmp_path, YES_NO + "combine: mean\n"), parts, lengths)
    assert (found["answer"], found["probability"]) == (False, pytest.approx(0.17))


def test_a_word_is_said_where_it_is_surest(tmp_path):
    parts = [entries(0.6, 0.1, start=1.0), entries(0.9, 0.2, start=7.0)]
    found = combined(own(tmp_path, WORDS), parts, [1.0, 1.0])
    assert found == {
        "keywords": [
            {"keyword": "a", "present": True, "probability": pytest.approx(0.9), "start": 7.0},
            {"keyword": "b", "present": False, "probability": pytest.approx(0.2), "start": None},
        ],
        "calibrated": True,
    }


def test_a_certain_answer_stays_certain(tmp_path):
    assert combined(own(tmp_path, YES_NO), [yes(1.0), yes(0.0)], [1.0, 1.0])["probability"] == 1.0


def test_items_and_pairs_are_all_that_differ_with_the_highest_score(tmp_path):
    parts = [
        {"pairs": [{"label": "a", "value": "x", "score": 0.2}, {"label": "a", "value": "y", "score": 0.5}]},
        {"pairs": []},
        {"pairs": [{"label": "a", "value": "x", "score": 0.3}, {"label": "b", "value": "x", "score": 0.1}]},
    ]
    text = "answer: pairs\ninstructions: [What]\nlabels: [{name: a, description: x}]\n"
    found = combined(own(tmp_path, text), parts, [1.0, 1.0, 1.0])["pairs"]
    assert [(p["label"], p["value"], p["score"]) for p in found] == [("a", "x", 0.3), ("a", "y", 0.5), ("b", "x", 0.1)]


def test_texts_are_joined_and_say_where_one_was_cut(tmp_path):
    parts = [
        {"text": "so it", "num_tokens": 2, "avg_logprob": -1.0, "finish_reason": "stop"},
        {"text": "", "num_tokens": 0, "avg_logprob": -0.1, "finish_reason": "stop"},
        {"text": "goes", "num_tokens": 1, "avg_logprob": -4.0, "finish_reason": "length"},
    ]
    found = combined(own(tmp_path, "answer: text\ninstructions: [What]\n"), parts, [1.0, 1.0, 1.0])
    assert (found["text"], found["num_tokens"], found["finish_reason"]) == ("so it goes", 3, "length")
    assert math.isclose(found["avg_logprob"], -7.1 / 5)


@pytest.mark.parametrize(("transcripts", "joined"), [(["so it", "", "goes"], "so it goes"), ([None] * 3, None)])
def test_translations_are_joined_with_what_was_translated(transcripts, joined):
    said = {"text": "so", "num_tokens": 1, "avg_logprob": -1.0, "finish_reason": "stop"}
    parts = [said | {"transcript": transcript} for transcript in transcripts]
    found = combined(load_task("translation", Path()), parts, [1.0] * 3)
    assert (found["text"], found["transcript"]) == ("so so so", joined)


def test_transcripts_are_one_text_with_all_words(tmp_path):
    def part(text: str, start: float, silent: float | None, finish_reason: str = "stop") -> dict[str, object]:
        words = [{"word": word, "start": start + i, "end": start + i + 0.5} for i, word in enumerate(text.split())]
        said = {"text": text, "num_tokens": len(words), "avg_logprob": -1.0, "finish_reason": finish_reason}
        return said | {"words": words, "no_speech_probability": silent, "via": "recogniser"}

    task = load_task({"asr": {"scope": "recording"}}, tmp_path)
    found = combined(task, [part("So it", 1.0, 0.3), part("", 30.0, None), part("goes.", 40.0, 0.1)], [9.0, 1.0, 2.0])
    assert (found["text"], [word["word"] for word in found["words"]]) == ("So it goes.", ["So", "it", "goes."])
    assert [word["start"] for word in found["words"]] == [1.0, 2.0, 40.0]
    assert (found["no_speech_probability"], found["via"], found["finish_reason"]) == (0.1, "recogniser", "stop")
    assert combined(task, [part("", 0.0, None, "no_speech")], [1.0])["no_speech_probability"] is None
    assert combined(task, [part("So", 0.0, 0.1), part("it", 9.0, 0.1) | {"via": "llm"}], [1.0, 1.0])["via"] == "both"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("answer: number\ninstructions: [What]\n", "answers of type number are not combined over segments"),
        ("answer: text\ninstructions: [What]\ncombine: any\n", "`combine` goes with scope recording and an answer"),
        (YES_NO + "needs_speech: false\n", "a whole recording is asked by its segments of speech"),
    ],
)
def test_what_cannot_be_combined_is_refused(tmp_path, text, message):
    with pytest.raises(TaskError, match=message):
        own(tmp_path, text)
