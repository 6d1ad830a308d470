from dataclasses import replace

import numpy as np
import pytest
import torch

from svbatch.hear import Hearing, Span, hear, timed_words
from svbatch.speech.projector import num_embeddings
from svbatch.speech.recogniser import Transcript

NUM_TONES = 2  # of the tiny bundle, before what was read


@pytest.fixture(scope="module")
def sounds(bursts) -> list[np.ndarray]:
    return [bursts(2.0, seed=1), bursts(0.05, seed=2), bursts(5.0, seed=3)]


@pytest.fixture(scope="module")
def hearings(sounds, tiny_model) -> list[Hearing]:
    with torch.inference_mode():
        return hear([Span(sound, 10.0, transcribed=i != 1) for i, sound in enumerate(sounds)], tiny_model)


def test_every_span_has_an_embedding_for_each_80_ms_that_it_lasts(sounds, hearings):
    frames = [-(-len(sound) // 320) for sound in sounds]
    assert [len(hearing.embeddings) for hearing in hearings] == [num_embeddings(n) for n in frames] == [25, 1, 63]
    assert [len(hearing.readings.blank) for hearing in hearings] == [25, 1, 63]


def test_the_llm_is_given_what_the_read_out_makes_of_the_embeddings(hearings, tiny_model):
    for hearing in hearings:
        log_probs = tiny_model.readout.log_probs(hearing.embeddings[None], hearing.readings.blank[None])[0]
        assert torch.equal(hearing.speech[NUM_TONES:], tiny_model.readout.spoken(hearing.embeddings, log_probs))
        assert 1 <= len(hearing.speech) - NUM_TONES <= len(hearing.embeddings)


def test_only_spans_whose_words_are_wanted_are_transcribed(hearings):
    assert [hearing.transcript is not None for hearing in hearings] == [True, False, True]


def test_a_span_is_heard_the_same_alone_and_among_longer_ones(sounds, hearings, tiny_model):
    with torch.inference_mode():
        [alone] = hear([Span(sounds[0], 10.0, transcribed=True)], tiny_model)
    torch.testing.assert_close(alone.embeddings, hearings[0].embeddings, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.speech, hearings[0].speech, atol=1e-4, rtol=0)
    assert alone.read == hearings[0].read
    assert alone.transcript.text == hearings[0].transcript.text
    assert alone.transcript.sum_logprob == pytest.approx(hearings[0].transcript.sum_logprob, abs=1e-4)


def test_words_have_times_of_the_recording_and_keep_their_spelling(hearings, tiny_model):
    words = timed_words("The rain, (again) §!", hearings[2], tiny_model)
    assert [word.word for word in words] == ["The", "rain,", "(again)", "§!"]
    edges = [edge for word in words for edge in (word.start, word.end)]
    assert edges == sorted(edges)
    assert 10.0 <= edges[0] <= edges[-1] <= 15.08
    assert timed_words("", hearings[2], tiny_model) == []


@pytest.mark.parametrize(
    ("text", "doubt", "read", "has_speech"),
    [
        ("words", 0.1, [7], True),
        ("words", 0.1, [], False),
        ("words", 0.95, [7], False),
        ("words", 0.95, [7, 8, 9], True),
        ("", 0.0, [7], False),
    ],
)
def test_read_out_and_recogniser_together_say_whether_anyone_speaks(hearings, text, doubt, read, has_speech):
    transcript = Transcript(text, [], 0.0, "stop", doubt)
    readings = replace(hearings[0].readings, ids=read)
    heard = replace(hearings[0], readings=readings, transcript=transcript)
    assert heard.has_speech == has_speech
    assert heard.text == (text if has_speech else "")
