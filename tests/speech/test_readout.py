import pytest
import torch

from svbatch.speech.readout import BLANK, Readout, kept, spoken_form


@pytest.fixture
def readout() -> Readout:
    """Reads tokens 7, 20 and 31, whose embeddings are three points of the plane."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    return Readout(torch.tensor([7, 20, 31]), points, torch.tensor(2.0))


def test_an_embedding_is_read_as_the_nearest_token(readout):
    speech = torch.tensor([[[0.9, 0.1], [0.1, 1.2], [-0.7, -0.8], [0.9, 0.0]]])
    log_probs = readout.log_probs(speech, torch.full((1, 4), -50.0))
    distances = torch.cdist(speech[0], readout.embeddings)
    assert log_probs.shape == (1, 4, 4)
    assert torch.allclose(log_probs.exp().sum(2), torch.ones(1, 4))
    assert torch.equal(log_probs[0, :, 1:].argmax(1), distances.argmin(1))
    assert readout.greedy(log_probs[0]) == [7, 20, 31, 7]


def test_the_formula_is_that_of_the_docstring(readout):
    x, blank = torch.tensor([0.3, -0.4]), 0.7
    logits = [blank, *(float(torch.tensor(2.0).exp() * (2 * x @ e - e @ e)) for e in readout.embeddings)]
    expected = torch.tensor(logits).log_softmax(0)
    assert torch.allclose(readout.log_probs(x[None, None], torch.tensor([[blank]]))[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "tokens"),
    [
        ([0, 0, 0], []),
        ([1, 1, 0, 1], [7, 7]),
        ([0, 1, 1, 2, 2, 0], [7, 20]),
        ([3, 2, 3], [31, 20, 31]),
        ([], []),
    ],
)
def test_repeats_are_merged_and_blanks_dropped(readout, path, tokens):
    log_probs = torch.nn.functional.one_hot(torch.tensor(path, dtype=torch.long), 4).float()
    assert readout.greedy(log_probs) == tokens


def test_tokens_that_are_not_scored_have_no_class(readout):
    assert readout.classes([20, 7, 8, 99, 0, 31]) == [2, 1, 3]
    assert readout.classes([]) == []
    assert BLANK == 0


def test_the_llm_is_given_what_says_a_token_and_one_in_eight_besides():
    blank_probability = torch.ones(20)
    blank_probability[[3, 4, 17]] = 0.2
    assert kept(blank_probability).tolist() == [0, 3, 4, 8, 16, 17]
    assert kept(torch.zeros(0)).tolist() == []


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("", ""),
        ("— …!", ""),
        ("Hello, World!", " hello world"),
        ("Don't stop, it’s 5 o'clock.", " don't stop it's 5 o'clock"),
        ("'quoted' words'", " quoted words"),
        ("  rock-and-roll\n", " rock and roll"),
        ("3.5% of snake_case", " 3 5 of snake case"),
        ("Café Straße", " café straße"),
    ],
)
def test_spoken_form_is_lower_case_words_with_a_space_before_each(written, spoken):
    assert spoken_form(written) == spoken
    assert spoken_form(spoken) == spoken
