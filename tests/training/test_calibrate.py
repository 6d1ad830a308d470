from dataclasses import replace

import numpy as np
import pytest

from svbatch.training.calibrate import fitted_labels, fitted_spotting, fitted_temperature
from svbatch.training.listening import Judged


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_temperature_that_made_the_answers_is_found(temperature):
    """Truths are drawn from the softmax of the logits; answers are those logits times the temperature."""
    random = np.random.default_rng(0)
    logits = random.normal(0.0, 2.0, (4000, 3))
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truths = [int(random.choice(3, p=row)) for row in honest]
    scaled = np.exp(logits * temperature)
    answers = scaled / scaled.sum(1, keepdims=True)
    assert fitted_temperature(answers.tolist(), truths) == pytest.approx(temperature, rel=0.1)


def test_answers_that_are_all_right_are_not_made_surer_than_so_few_can_tell():
    temperature = fitted_temperature([[0.9, 0.1]] * 10 + [[0.2, 0.8]] * 10, [0] * 10 + [1] * 10)
    right = [0.9 ** (1 / temperature) / (0.9 ** (1 / temperature) + 0.1 ** (1 / temperature)),
             0.8 ** (1 / temperature) / (0.8 ** (1 / temperature) + 0.2 ** (1 / temperature))]  # fmt: skip
    assert min(right) < 1 - 1 / 22 < max(right)


def test_an_answer_that_is_surely_wrong_does_not_break_the_fit():
    assert np.isfinite(fitted_temperature([[1.0, 0.0], [0.0, 1.0]], [1, 1]))


def test_the_weights_of_llm_and_evidence_that_made_the_answers_are_found():
    random = np.random.default_rng(0)
    log_odds, evidence = random.normal(0.0, 4.0, 8000), -random.exponential(3.0, 8000)
    written = random.uniform(-1.0, 1.0, 8000)
    truths = random.random(8000) < 1 / (1 + np.exp(-(log_odds / 2 + 0.6 * evidence + 2.0 * written + 1.5)))
    yes = 1 / (1 + np.exp(-log_odds))
    fitted = fitted_spotting(yes.tolist(), evidence.tolist(), written.tolist(), truths.tolist())
    assert fitted.temperature == pytest.approx(2.0, rel=0.1)
    assert fitted.spotting == pytest.approx(0.6, rel=0.1)
    assert fitted.written == pytest.approx(2.0, rel=0.1)
    assert fitted.bias == pytest.approx(1.5, rel=0.1)


def test_an_llm_that_is_always_wrong_weighs_nothing_rather_than_the_other_way():
    fitted = fitted_spotting([0.01, 0.99] * 20, [-9.0, 0.0] * 20, [0.0, 0.0] * 20, [True, False] * 20)
    assert 1 / fitted.temperature < 0.05


def judged(llm: np.ndarray, voice: np.ndarray, truths: np.ndarray) -> Judged:
    """Log-odds as answers of three labels."""
    normal = [scores - np.logaddexp.reduce(scores, axis=1, keepdims=True) for scores in (llm, voice)]
    no_habit = [0.0] * llm.shape[1]
    return Judged(np.exp(normal[0]).tolist(), [int(truth) for truth in truths], no_habit, normal[1].tolist())


def test_the_weights_of_llm_and_voice_that_made_the_answers_are_found():
    random = np.random.default_rng(0)
    llm, voice = random.normal(0, 2, (2, 6000, 3))
    scores = llm / 3 + 0.8 * voice
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    truths = np.array([random.choice(3, p=share) for share in shares])
    found = fitted_labels(judged(llm, voice, truths))
    assert found.temperature == pytest.approx(3.0, rel=0.15)
    assert found.voice == pytest.approx(0.8, rel=0.1)


def test_an_llm_that_does_not_listen_leaves_the_answer_to_the_voice():
    random = np.random.default_rng(1)
    truths = random.integers(3, size=300)
    voice = 2.0 * np.eye(3)[truths] + random.normal(0, 0.5, (300, 3))
    found = fitted_labels(judged(random.normal(0, 1, (300, 3)), voice, truths))
    assert found.voice > 1.0
    assert found.voice * found.temperature > 5.0  # so many times as much as the LLM


def test_the_share_of_the_habit_that_was_in_the_scores_is_found():
    random = np.random.default_rng(2)
    knows, habit = random.normal(0, 2, (6000, 3)), np.array([-0.2, -2.0, -4.0])
    shares = np.exp(knows) / np.exp(knows).sum(axis=1, keepdims=True)
    truths = np.array([random.choice(3, p=share) for share in shares])
    found = fitted_labels(replace(judged(1.5 * knows + 0.7 * habit, knows, truths), voice=[], habit=habit.tolist()))
    assert found.habit == pytest.approx(0.7, abs=0.1)
    assert found.temperature == pytest.approx(1.5, rel=0.1)
    assert found.voice == 0.0


def test_where_the_llm_likes_no_label_by_habit_a_temperature_alone_is_fitted():
    random = np.random.default_rng(4)
    knows = random.normal(0, 2, (400, 3))
    truths = np.array([random.choice(3, p=np.exp(row) / np.exp(row).sum()) for row in knows])
    answers = replace(judged(2.0 * knows, knows, truths), voice=[])
    found = fitted_labels(answers)
    assert found.voice == 0.0
    assert 1.5 < found.temperature < 3.0
    assert found.temperature == pytest.approx(fitted_temperature(answers.probabilities, answers.truths), rel=0.03)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_of_few_answers_the_share_is_as_good_as_the_best_of_a_grid(seed, share):
    """Once the search stepped over an edge and stayed there."""
    random = np.random.default_rng(seed)
    knows, habit = random.normal(0, 1, (60, 4)), random.normal(-3, 2, 4)
    truths = np.array([random.choice(4, p=np.exp(row) / np.exp(row).sum()) for row in knows])
    answers = replace(judged(2 * knows + share * habit, knows, truths), voice=[], habit=habit.tolist())
    found = fitted_labels(answers)
    grid = [(1 / t, s) for t in np.geomspace(0.1, 20, 40) for s in np.linspace(0, 1, 41)]
    best = min(log_loss(answers, weight, s) for weight, s in grid)
    assert log_loss(answers, 1 / found.temperature, found.habit) < best + 0.005


def log_loss(answers: Judged, weight: float, share: float) -> float:
    """As calibration means it: every label weighs the same, and so many answers promise no more than they can."""
    logits = weight * (np.log(answers.probabilities) - share * np.array(answers.habit))
    log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    num_answers, num_labels = log_probs.shape
    doubt = 1 / (num_answers + 2)
    targets = np.full(log_probs.shape, doubt / (num_labels - 1))
    targets[np.arange(num_answers), answers.truths] = 1 - doubt
    shares = 1 / np.bincount(answers.truths)[answers.truths]
    return float(-(targets * log_probs).sum(axis=1) @ (shares / shares.sum()))


def test_a_label_counts_the_same_however_often_it_occurs():
    """95 of one label, all right and sure; 5 of another, taken for the first: no better than a guess."""
    answers, truths = [[0.99, 0.01]] * 100, [0] * 95 + [1] * 5
    assert fitted_temperature(answers, truths) == 20.0
    assert fitted_temperature([[0.99, 0.01]] * 95 + [[0.01, 0.99]] * 5, truths) < 2.0
