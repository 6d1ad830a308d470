from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from svbatch.ask import ask
from svbatch.generate import Unanswered
from svbatch.tasks.task import load_task
from svbatch.training.data import read_manifest
from svbatch.training.listening import asked_keywords, asked_labels, asked_speaker_counts, heard_examples


@pytest.fixture(scope="module")
def heard(spoken, tiny_model):
    return list(heard_examples(read_manifest(spoken / "train.jsonl"), tiny_model))


def test_a_label_is_asked_of_every_recording_that_has_it_and_holds_speech(heard, tiny_model):
    judged = asked_labels("emotion", heard, tiny_model)
    told = [each.example.labels["emotion"] for each in heard if each.hearings and "emotion" in each.example.labels]
    assert 0 < len(told) < len(heard)
    assert judged.truths == [["neutral", "happy", "sad", "angry"].index(emotion) for emotion in told]
    assert [sum(row) for row in judged.probabilities] == pytest.approx([1.0] * len(told), abs=1e-3)


def test_a_reader_is_asked_of_the_transcript_alone(heard, tiny_model):
    deaf = [replace(each, hearings=[replace(h, speech=h.speech[:0]) for h in each.hearings]) for each in heard]
    read, as_read = (asked_labels("emotion", told, tiny_model, is_read=True) for told in (heard, deaf))
    assert np.array(read.probabilities) == pytest.approx(np.array(as_read.probabilities), abs=1e-4)
    assert read.habit == pytest.approx(as_read.habit)
    assert read.probabilities != asked_labels("emotion", heard, tiny_model).probabilities


def test_two_words_of_a_recording_are_asked_as_each_alone(heard, tiny_model):
    asked = asked_keywords(heard, tiny_model, seed=0)
    assert {each.truth for each in asked} == {True, False}
    spoken = [each for each in heard if each.example.lang == "en" and each.example.text and each.hearings]
    [first, second, *_] = asked
    for question in (first, second):
        task = load_task({"keyword_search": {"keywords": [question.word]}}, Path())
        answers = ask([task], spoken[0].hearings, tiny_model)[task.name]
        alone = max(answer["keywords"][0]["probability"] for answer in answers if not isinstance(answer, Unanswered))
        assert question.probability == pytest.approx(alone, abs=1e-4)
        assert (question.word in (spoken[0].example.text or "").lower().split()) == question.truth


def test_what_no_recording_is_labelled_with_is_not_asked(heard, tiny_model):
    assert asked_labels("accent", heard, tiny_model).truths == []


def test_speakers_are_counted_in_clips_that_are_joined(spoken, tiny_model):
    judged = asked_speaker_counts(read_manifest(spoken / "train.jsonl"), tiny_model, seed=0)
    assert set(judged.truths) == {0, 1}
    assert all(len(row) == 2 for row in judged.probabilities)
