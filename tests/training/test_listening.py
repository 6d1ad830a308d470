from dataclasses import replace

import numpy as np
import pytest

from svbatch.training.data import read_manifest
from svbatch.training.listening import asked_labels, asked_speaker_counts, heard_examples


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


def test_what_no_recording_is_labelled_with_is_not_asked(heard, tiny_model):
    assert asked_labels("accent", heard, tiny_model).truths == []


def test_speakers_are_counted_in_clips_that_are_joined(spoken, tiny_model):
    judged = asked_speaker_counts(read_manifest(spoken / "train.jsonl"), tiny_model, seed=0)
    assert set(judged.truths) == {0, 1}
    assert all(len(row) == 2 for row in judged.probabilities)
