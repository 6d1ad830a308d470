import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.training.intervals import interval, paired_interval, resampled, verdict


def share(sums):
    return 100 * sums[..., 0] / sums[..., 1]


def counts_of(right):
    right = np.asarray(right, dtype=np.float64)
    return np.stack([right, np.ones_like(right)], axis=1)


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_interval_holds_the_truth_about_nineteen_times_in_twenty(spread):
    """Forty speakers with five recordings each, whose accuracies differ by `spread`; the truth is 50%."""
    random = np.random.default_rng(0)
    speakers = [f"s{i // 5}" for i in range(200)]
    held = 0
    for trial in range(300):
        skill = 1 / (1 + np.exp(-spread * random.normal(size=40)))
        counts = counts_of(random.random(200) < np.repeat(skill, 5))
        low, high = interval(share(resampled(counts, speakers, seed=trial, num=500)))
        held += low <= 50 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_recordings_of_one_speaker_are_not_taken_for_independent():
    """Each speaker is all right or all wrong: by recording the interval would be far too narrow."""
    right = np.repeat(np.arange(20) % 2, 10)
    speakers = [f"s{i // 10}" for i in range(200)]
    low, high = interval(share(resampled(counts_of(right), speakers, seed=0)))
    alone_low, alone_high = interval(share(resampled(counts_of(right), [None] * 200, seed=0)))
    assert high - low > 2 * (alone_high - alone_low)


def test_draws_follow_from_the_seed_alone():
    counts = counts_of([1, 0, 1, 1])
    speakers = ["a", "a", None, "b"]
    assert np.array_equal(resampled(counts, speakers, seed=3), resampled(counts, speakers, seed=3))
    assert not np.array_equal(resampled(counts, speakers, seed=3), resampled(counts, speakers, seed=4))


@given(st.lists(st.booleans(), min_size=2, max_size=30), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_system_ties_with_itself(right, seed):
    counts = counts_of(right)
    low, high = paired_interval(counts, counts, share, [None] * len(right), seed=seed)
    assert (low, high) == (0.0, 0.0)
    assert verdict(low, high, is_error=False) == "tie"


def test_pairing_finds_a_difference_that_two_intervals_apart_would_hide():
    random = np.random.default_rng(1)
    theirs = random.random(300) < 0.5
    ours = theirs | (random.random(300) < 0.1)
    speakers = [None] * 300
    low, high = paired_interval(counts_of(ours), counts_of(theirs), share, speakers, seed=0)
    own = interval(share(resampled(counts_of(ours), speakers, seed=0)))
    other = interval(share(resampled(counts_of(theirs), speakers, seed=0)))
    assert own[0] < other[1]
    assert verdict(low, high, is_error=False) == "beats"


@pytest.mark.parametrize(
    ("low", "high", "is_error", "says"),
    [
        (1, 2, False, "beats"),
        (-2, -1, False, "loses"),
        (-2, -1, True, "beats"),
        (1, 2, True, "loses"),
        (0, 2, True, "tie"),
    ],
)
def test_less_of_an_error_is_better_and_an_interval_with_zero_is_a_tie(low, high, is_error, says):
    assert verdict(low, high, is_error=is_error) == says
