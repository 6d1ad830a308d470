import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svbatch.tasks.answers import label_answers, probabilities, yes_no_answers

SCORES = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 300)), elements=st.floats(-2000, 0, width=32))


@settings(deadline=None)
@given(SCORES, st.floats(0.05, 20))
def test_probabilities_sum_to_one_and_are_highest_where_the_score_is(scores, temperature):
    found = probabilities(scores, temperature)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    best = np.take_along_axis(found, scores.argmax(axis=1, keepdims=True), axis=1)
    assert (found <= best).all()


def test_a_probability_is_the_softmax_of_score_over_temperature():
    weights = np.exp([-1 / 2, -3 / 2])
    np.testing.assert_allclose(probabilities([[-1, -3]], 2), [weights / weights.sum()], rtol=1e-12)


@pytest.mark.parametrize("row", [[np.nan, -1], [-np.inf, -np.inf], [np.inf, -1]])
def test_scores_that_are_no_numbers_are_an_error_that_names_the_row(row):
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        probabilities([[-1, -2], row])


def test_a_label_that_cannot_be_said_has_probability_zero():
    assert probabilities([[-np.inf, -3]]).tolist() == [[0, 1]]


@pytest.mark.parametrize("temperature", [0, -1, np.nan, np.inf])
def test_a_temperature_is_a_positive_number(temperature):
    with pytest.raises(ValueError, match="temperature"):
        probabilities([[-1, -2]], temperature)


def test_a_label_answer_has_the_most_probable_label_and_all_probabilities():
    scores = np.log([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1]])
    first, second = label_answers(scores, ["a", "b", "c"])
    assert (first["label"], first["reason"], first["calibrated"]) == ("c", None, False)
    assert first["probability"] == pytest.approx(0.5)
    assert [entry["label"] for entry in first["probabilities"]] == ["a", "b", "c"]
    assert [entry["probability"] for entry in first["probabilities"]] == pytest.approx([0.2, 0.3, 0.5])
    assert second["label"] == "a"


def test_equal_scores_give_the_first_label():
    assert label_answers([[-1, -1]], ["a", "b"])[0]["label"] == "a"


def test_a_weak_answer_is_null_with_a_reason_never_a_wrong_label():
    weak, strong = label_answers(np.log([[0.6, 0.4], [0.9, 0.1]]), ["a", "b"], min_probability=0.8)
    assert (weak["label"], weak["reason"]) == (None, "low_confidence")
    assert weak["probability"] == pytest.approx(0.6)
    assert (strong["label"], strong["reason"]) == ("a", None)


def test_what_was_fitted_makes_an_answer_calibrated():
    answer = label_answers(np.log([[0.9, 0.1]]), ["a", "b"], temperature=2.0, is_calibrated=True)[0]
    assert answer["calibrated"] is True
    assert answer["probability"] == pytest.approx(0.75)


def test_yes_no_gives_the_probability_of_yes():
    yes, no = yes_no_answers(np.log([[0.9, 0.1], [0.3, 0.7]]))
    assert yes == {"answer": True, "probability": pytest.approx(0.9), "reason": None, "calibrated": False}
    assert no == {"answer": False, "probability": pytest.approx(0.3), "reason": None, "calibrated": False}


def test_evidence_is_added_to_the_log_odds_of_yes_after_the_temperature():
    [answer] = yes_no_answers(np.log([[0.9, 0.1]]), evidence=[-1.0], temperature=2.0, is_calibrated=True)
    assert answer["probability"] == pytest.approx(1 / (1 + np.exp(1.0) / 3))
    assert answer["calibrated"]


def test_a_weak_yes_and_a_weak_no_are_null():
    answers = yes_no_answers(np.log([[0.6, 0.4], [0.4, 0.6], [0.1, 0.9]]), min_probability=0.8)
    assert [answer["answer"] for answer in answers] == [None, None, False]
    assert [answer["reason"] for answer in answers] == ["low_confidence", "low_confidence", None]


def test_one_label_too_few_is_a_bug_that_shows():
    with pytest.raises(ValueError, match="zip"):
        label_answers([[-1, -2, -3]], ["a", "b"])


def test_a_row_does_not_depend_on_its_neighbours():
    scores = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32) * 10
    alone = [label_answers(row[None], list("abcdefg"))[0] for row in scores]
    assert label_answers(scores, list("abcdefg")) == alone
