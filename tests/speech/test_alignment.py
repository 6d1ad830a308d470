from itertools import groupby, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.speech.alignment import Word, best_path, word_times
from svbatch.speech.readout import BLANK


def posteriors(path: list[int], num_classes: int = 4) -> np.ndarray:
    """(T, V) log-probabilities that say `path`, a class for each embedding."""
    likely = np.full((len(path), num_classes), 0.02)
    likely[np.arange(len(path)), path] = 0.94
    return np.log(likely / likely.sum(axis=1, keepdims=True)).astype(np.float32)


def rounded(words: list[Word]) -> list[tuple[str, float, float]]:
    return [(word.word, round(word.start, 4), round(word.end, 4)) for word in words]


def best_by_trying_all(labels: list[int], log_probs: np.ndarray) -> float | None:
    """The score of the likeliest of all V ** T paths that read as `labels`."""
    scores = [
        sum(float(row[c]) for row, c in zip(log_probs, path, strict=True))
        for path in product(range(log_probs.shape[1]), repeat=len(log_probs))
        if [c for c, _ in groupby(path) if c != BLANK] == labels
    ]
    return max(scores, default=None)


def test_words_start_one_embedding_before_the_posterior_says_them_and_end_with_it():
    log_probs = posteriors([0, 1, 1, 2, 0, 3, 3, 3, 0, 0])
    words = word_times(["Ab,", "c"], [[1, 2], [3]], log_probs)
    assert rounded(words) == [("Ab,", 0.0, 0.32), ("c", 0.32, 0.64)]


def test_a_word_ends_where_the_next_one_starts_at_the_latest():
    words = word_times(["a", "b"], [[1], [2]], posteriors([0, 1, 2, 0]))
    assert rounded(words) == [("a", 0.0, 0.08), ("b", 0.08, 0.24)]


def test_a_token_said_twice_is_parted_by_a_blank():
    assert best_path([1, 1], posteriors([1, 1, 0, 1])) == [(0, 1), (3, 3)]
    assert best_path([1, 1], posteriors([1, 1, 1, 1]))[0][1] + 1 < best_path([1, 1], posteriors([1, 1, 1, 1]))[1][0]


def test_a_text_that_the_posterior_does_not_say_is_still_laid_over_it():
    spans = best_path([2, 3], posteriors([0, 1, 1, 0, 1]))
    assert spans is not None
    assert spans[0][1] < spans[1][0]


def test_words_that_the_readout_cannot_write_share_the_gap_between_their_neighbours():
    log_probs = posteriors([0, 1, 0, 0, 0, 0, 2, 0])
    words = word_times(["a", "§", "%", "b"], [[1], [], [], [2]], log_probs)
    assert rounded(words) == [("a", 0.0, 0.16), ("§", 0.16, 0.28), ("%", 0.28, 0.4), ("b", 0.4, 0.56)]


def test_words_before_the_first_and_after_the_last_reach_to_the_ends():
    words = word_times(["§", "a", "%"], [[], [1], []], posteriors([0, 0, 1, 0, 0]))
    assert rounded(words) == [("§", 0.0, 0.08), ("a", 0.08, 0.24), ("%", 0.24, 0.4)]


@pytest.mark.parametrize("classes", [[[1, 2], [3]], [[], []]], ids=["too long", "unwritable"])
def test_a_text_without_a_path_is_spread_evenly(classes):
    words = word_times(["x", "y"], classes, posteriors([1, 2]))
    assert rounded(words) == [("x", 0.0, 0.08), ("y", 0.08, 0.16)]


def test_no_words_and_no_sound_are_no_error():
    assert word_times([], [], posteriors([0, 1])) == []
    assert rounded(word_times(["x"], [[1]], np.zeros((0, 4), np.float32))) == [("x", 0.0, 0.0)]


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(1, 2), max_size=3),
    log_probs=st.integers(1, 6).flatmap(
        lambda size: st.lists(
            st.lists(st.floats(-5, 0, width=32), min_size=3, max_size=3), min_size=size, max_size=size
        )
    ),
)
def test_the_path_is_the_best_of_all_paths(labels, log_probs):
    scores = np.array(log_probs, np.float32)
    best = best_by_trying_all(labels, scores)
    spans = best_path(labels, scores)
    if best is None:
        assert spans is None
        return
    path = [BLANK] * len(scores)
    for label, (first, last) in zip(labels, spans, strict=True):
        path[first : last + 1] = [label] * (last + 1 - first)
    assert [c for c, _ in groupby(path) if c != BLANK] == labels
    assert sum(float(row[c]) for row, c in zip(scores, path, strict=True)) == pytest.approx(best, abs=1e-4)
