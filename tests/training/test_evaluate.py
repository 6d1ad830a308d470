import numpy as np
import pytest

from svbatch.training.evaluate import fitted_temperature, normalised


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


@pytest.mark.parametrize(
    ("written", "compared"), [("Mr. O'Neil -- OK?", "mister o'neil okay"), ("St Paul's", "saint paul's"), ("", "")]
)
def test_texts_are_compared_in_spoken_form_with_abbreviations_spelled_out(written, compared):
    assert normalised(written) == compared
