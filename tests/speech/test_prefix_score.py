from itertools import groupby, product

import numpy as np
import pytest
import torch

from svbatch.speech.prefix_score import UNWRITABLE, PrefixScorer
from svbatch.speech.readout import BLANK, Readout

END = 99
READOUT = Readout(torch.tensor([10, 20, 30]), torch.zeros(3, 2), torch.zeros(()))


def posteriors(seed: int, length: int) -> torch.Tensor:
    return torch.from_numpy(np.log(np.random.default_rng(seed).dirichlet(np.ones(4), length)))


def texts_of_all_paths(log_probs: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The judge: the probability of every text, summed over all (1 + V) ** T paths that read as it."""
    sums: dict[tuple[int, ...], float] = {}
    for path in product(range(log_probs.shape[1]), repeat=len(log_probs)):
        text = tuple(10 * c for c, _ in groupby(path) if c != BLANK)
        probability = float(log_probs[range(len(path)), list(path)].sum().exp())
        sums[text] = sums.get(text, 0.0) + probability
    return sums


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("text", [(), (10,), (20, 20), (30, 10, 30)])
def test_a_score_is_the_share_of_all_paths_whose_text_goes_on_so(seed, text):
    log_probs = posteriors(seed, 5)
    sums = texts_of_all_paths(log_probs)
    scorer = PrefixScorer(log_probs, READOUT, END)
    for token in text:
        scorer.weigh([token])
        scorer.follow(token)
    begins = sum(p for said, p in sums.items() if said[: len(text)] == text)
    wanted = [
        sum(p for said, p in sums.items() if said[: len(text) + 1] == (*text, token)) / begins for token in (10, 20, 30)
    ]
    wanted.append(sums.get(text, 0.0) / begins)
    floor = np.exp(UNWRITABLE)
    assert np.exp(scorer.weigh([10, 20, 30, END])) == pytest.approx([max(floor, each) for each in wanted], rel=1e-6)


def test_what_may_follow_sums_to_one():
    scorer = PrefixScorer(posteriors(7, 40), READOUT, END)
    for token in (10, 30, 30, 20):
        assert sum(np.exp(scorer.weigh([10, 20, 30, END]))) == pytest.approx(1.0)
        scorer.follow(token)


def test_a_token_that_the_readout_cannot_write_is_passed_over():
    scorer, judge = (PrefixScorer(posteriors(3, 12), READOUT, END) for _ in range(2))
    assert scorer.weigh([55]) == [UNWRITABLE]
    scorer.follow(55)
    assert scorer.weigh([10, END]) == judge.weigh([10, END])


def test_long_and_certain_sound_stays_finite():
    log_probs = torch.full((375, 4), -40.0)
    log_probs[:, 0] = 0.0
    log_probs[200] = torch.tensor([-40.0, 0.0, -40.0, -40.0])
    scorer = PrefixScorer(log_probs, READOUT, END)
    first = scorer.weigh([10, 20, END])
    assert first[0] == pytest.approx(0.0, abs=1e-6)
    assert first[1:] == [UNWRITABLE, UNWRITABLE]
    scorer.follow(10)
    assert scorer.weigh([20, END]) == [UNWRITABLE, pytest.approx(0.0, abs=1e-6)]
