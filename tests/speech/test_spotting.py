from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.speech import spotting
from svbatch.speech.alignment import best_path
from svbatch.speech.spotting import LEAST, Spotted


def posteriors(path: list[int], num_classes: int = 4, likely: float = 0.94) -> np.ndarray:
    """(T, V) log-probabilities that say `path`, a class for each embedding."""
    probs = np.full((len(path), num_classes), (1 - likely) / (num_classes - 1))
    probs[np.arange(len(path)), path] = likely
    return np.log(probs).astype(np.float32)


def spot(words: list[list[int]], log_probs: np.ndarray) -> list[Spotted | None]:
    [found] = spotting.spot(words, [log_probs], [log_probs.max(axis=1)])
    return found


def path_score(labels: list[int], log_probs: np.ndarray) -> float:
    """Of the best CTC path that reads as `labels` from its first to its last embedding, -inf if there is none."""
    spans = best_path(labels, log_probs)
    if spans is None or spans[0][0] > 0 or spans[-1][1] < len(log_probs) - 1:
        return -np.inf
    classes = np.zeros(len(log_probs), dtype=int)
    for label, (first, last) in zip(labels, spans, strict=True):
        classes[first : last + 1] = label
    return float(log_probs[np.arange(len(classes)), classes].sum())


def test_a_word_that_is_read_has_evidence_zero_and_its_place():
    assert spot([[2, 3]], posteriors([0, 1, 0, 0, 2, 2, 0, 3, 0])) == [Spotted(0.0, pytest.approx(0.24))]


def test_a_near_miss_has_more_evidence_than_a_word_that_was_not_said():
    log_probs = posteriors([0, 1, 0, 2, 0])
    log_probs[3] = np.log([0.05, 0.05, 0.5, 0.4])
    near, far = spot([[3], [1, 1, 1]], log_probs)
    assert near.evidence == pytest.approx(np.log(0.4 / 0.5), abs=1e-5)
    assert far.evidence < near.evidence


def test_evidence_is_per_token():
    log_probs = posteriors([0, 0, 0, 0, 0])
    once, twice = spot([[1], [1, 2]], log_probs)
    assert once.evidence == pytest.approx(twice.evidence, abs=1e-5)


def test_words_are_spotted_alone_as_together():
    log_probs = np.log(np.random.default_rng(0).dirichlet(np.ones(5), 30)).astype(np.float32)
    words = [[1], [2, 2, 3], [], [4, 1, 2, 3, 1]]
    assert spot(words, log_probs) == [spot([word], log_probs)[0] for word in words]


def test_a_word_without_classes_is_not_spotted_and_one_too_long_is_not_there():
    assert spot([[], [1, 2, 3]], posteriors([0, 1])) == [None, Spotted(LEAST, 0.0)]
    assert spotting.spot([[1]], [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)]) == [[Spotted(LEAST, 0.0)]]


def test_hearings_are_spotted_alone_as_together():
    random = np.random.default_rng(1)
    words = [[1], [2, 2, 3], [], [4, 1, 2, 3, 1]]
    several = [np.log(random.dirichlet(np.ones(5), length)).astype(np.float32) for length in (30, 3, 0, 41, 1)]
    highest = [log_probs.max(axis=1, initial=-np.inf) for log_probs in several]
    alone = [spotting.spot(words, [own], [best])[0] for own, best in zip(several, highest, strict=True)]
    assert spotting.spot(words, several, highest) == alone


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 6), st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_evidence_is_that_of_the_best_of_all_spans(seed, length, word):
    log_probs = np.log(np.random.default_rng(seed).dirichlet(np.ones(4), length)).astype(np.float32)
    relative = log_probs - log_probs.max(axis=1, keepdims=True)
    spans = [(a, b) for a, b in product(range(length), range(1, length + 1)) if a < b]
    judged = max(path_score(word, relative[a:b]) for a, b in spans)
    [found] = spot([word], log_probs)
    assert found.evidence == pytest.approx(max(LEAST, judged / len(word)), abs=1e-4)
