from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.tasks.task import load_task
from svbatch.training.metrics import (
    bleu,
    bleu_counts,
    calibration_error,
    chrf,
    f1,
    keyword_counts,
    metric_of,
    slot_counts,
    word_counts,
)
from svbatch.training.normaliser import normalised

WORDS = st.lists(
    st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "and", "ran", "off"]), min_size=1, max_size=12
).map(" ".join)
LABELS = ("neutral", "happy", "sad", "angry")


def metric(name, **options):
    found = metric_of(load_task({name: options} if options else name, Path()))
    assert found is not None
    return found


def figure(found, truths, answers):
    """The figure over sums of counts, as intervals have it."""
    return float(found.figure(np.sum([found.counts(t, a) for t, a in zip(truths, answers, strict=True)], axis=0)))


@pytest.mark.parametrize(
    ("written", "compared"), [("Mr. O'Neil -- OK?", "mister o'neil okay"), ("St Paul's", "saint paul's"), ("", "")]
)
def test_texts_are_compared_in_spoken_form_with_abbreviations_spelled_out(written, compared):
    assert normalised(written) == compared


def test_word_errors_are_substitutions_deletions_and_insertions_per_word_of_the_truth():
    assert word_counts("The cat sat.", "the dog sat down").tolist() == [2, 3]
    assert word_counts("The cat sat.", None).tolist() == [3, 3]
    assert figure(metric("asr"), ["The cat sat.", "on a mat"], ["the dog sat down", "on a"]) == pytest.approx(50.0)


def test_recall_is_averaged_over_the_labels_that_occur_and_no_answer_is_wrong():
    truths, answers = ["happy", "happy", "sad", "sad"], ["happy", "sad", None, "sad"]
    assert figure(metric("emotion"), truths, answers) == pytest.approx((50 + 50) / 2)
    assert figure(metric("emotion"), ["happy"] * 3 + ["sad"], ["happy"] * 4) == pytest.approx(50.0)


def test_each_keyword_that_is_asked_for_counts_as_one_answer():
    truths = [{"rain": True, "snow": False}, {"sun": True, "fog": False}]
    answers = [{"rain": True, "snow": True}, None]
    assert figure(metric("keyword_search", keywords=["rain"]), truths, answers) == pytest.approx(25.0)


def test_keywords_are_sets_in_spoken_form():
    assert keyword_counts(["Town Hall", "bus"], ["town hall", "tram", "bus"]).tolist() == [pytest.approx(0.8), 1.0]
    assert keyword_counts([], None).tolist() == [1.0, 1.0]


def test_a_slot_whose_value_is_said_exactly_is_one_true_positive_in_words_and_one_in_characters():
    assert slot_counts([("place", "New York")], [("place", "new york")]).tolist() == [2, 0, 0]


def test_a_slot_with_one_of_two_words_wrong_counts_its_distance_on_both_sides():
    """Words: distance 1/2. Characters: "new york" against "new fork" is 1/8."""
    counts = slot_counts([("place", "New York")], [("place", "New Fork")])
    assert counts.tolist() == [2, pytest.approx(0.625), pytest.approx(0.625)]
    assert float(f1(counts)) == pytest.approx(100 * 4 / (4 + 1.25))


def test_a_slot_that_is_missing_or_invented_is_wrong_as_a_whole():
    assert slot_counts([("place", "Rome"), ("date", "May")], [("date", "may"), ("time", "noon")]).tolist() == [2, 2, 2]
    assert slot_counts([("place", "Rome")], None).tolist() == [0, 0, 2]
    assert float(f1(np.zeros(3))) == 0.0


def test_of_two_values_for_one_slot_the_nearer_is_matched():
    counts = slot_counts([("product", "two chairs")], [("product", "a desk"), ("product", "two chairs")])
    assert counts.tolist() == [2, 2, 0]


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_bleu_over_sums_is_sacrebleus(pairs):
    truths, answers = zip(*pairs, strict=True)
    assert figure(metric("translation"), truths, answers) == pytest.approx(
        metric("translation").library(truths, answers), abs=1e-6
    )


def test_bleu_of_the_reference_itself_is_100_and_of_nothing_0():
    text = "Der Zug nach Hamburg fährt um neun."
    assert float(bleu(bleu_counts(text, text))) == pytest.approx(100.0)
    assert float(bleu(bleu_counts(text, None))) == 0.0
    assert chrf([text], [text]) == pytest.approx(100.0)


@given(st.lists(st.tuples(WORDS, st.one_of(st.none(), WORDS)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_word_error_rate_over_sums_is_jiwers(pairs):
    truths, answers = zip(*pairs, strict=True)
    assert figure(metric("asr"), truths, answers) == pytest.approx(metric("asr").library(truths, answers))


@given(
    st.lists(st.tuples(st.sampled_from(LABELS), st.one_of(st.none(), st.sampled_from(LABELS))), min_size=1, max_size=20)
)
@settings(max_examples=60, deadline=None)
def test_average_recall_over_sums_is_scikit_learns(pairs):
    truths, answers = zip(*pairs, strict=True)
    assert figure(metric("emotion"), truths, answers) == pytest.approx(metric("emotion").library(truths, answers))


@given(st.lists(st.tuples(*[st.lists(st.sampled_from(LABELS), min_size=1, unique=True)] * 2), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_keyword_f1_over_sums_is_scikit_learns_over_samples(pairs):
    truths, answers = zip(*pairs, strict=True)
    assert figure(metric("keywords"), truths, answers) == pytest.approx(metric("keywords").library(truths, answers))


def test_accuracy_over_sums_is_scikit_learns():
    truths, answers = [{"a": True, "b": False}, {"c": True}], [{"a": True, "b": True}, None]
    found = metric("keyword_search", keywords=["a"])
    assert figure(found, truths, answers) == pytest.approx(found.library(truths, answers))


def test_a_task_without_a_metric_has_none():
    assert metric_of(load_task({"question": {"question": "Why?"}}, Path())) is None


def test_every_metric_that_a_library_task_names_is_known():
    for name in ("asr", "translation", "intent", "emotion", "keywords", "slots"):
        task = load_task(name, Path())
        assert metric(name).name == task.metric


def test_probabilities_that_hold_have_no_calibration_error_and_sure_mistakes_have_all_of_it():
    assert calibration_error([0.75] * 4, [True, True, True, False]) == pytest.approx(0.0)
    assert calibration_error([1.0] * 4, [False] * 4) == pytest.approx(100.0)
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [True, False, True, True]) == pytest.approx(45.0)
