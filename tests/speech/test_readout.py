import pytest
import torch

from svbatch.speech.readout import BLANK, TONE_EVERY, TONE_SHARE, Readout, spoken_form


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


def read_as(readout: Readout, path: list[int], sureness: float = 40.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random speech embeddings, and log-probabilities that say the classes of `path`."""
    logits = sureness * torch.nn.functional.one_hot(torch.tensor(path, dtype=torch.long), 4).float()
    speech = torch.randn(len(path), 2, generator=torch.Generator().manual_seed(len(path)))
    return speech, logits.log_softmax(1)


def test_the_llm_is_given_what_is_said_and_one_in_eight_of_what_is_not(readout):
    path = [0] * 20
    path[3], path[4], path[17] = 1, 1, 2
    speech, log_probs = read_as(readout, path)
    token = readout.embeddings
    expected = [
        TONE_SHARE * speech[0],
        token[0] + TONE_SHARE * (speech[3] + speech[4]) / 2,
        TONE_SHARE * speech[TONE_EVERY],
        TONE_SHARE * speech[2 * TONE_EVERY],
        token[1] + TONE_SHARE * speech[17],
    ]
    assert torch.allclose(readout.spoken(speech, log_probs), torch.stack(expected), atol=1e-6)
    assert readout.spoken(speech[:0], log_probs[:0]).shape == (0, 2)


def test_a_token_said_twice_with_a_blank_between_is_given_twice(readout):
    speech, log_probs = read_as(readout, [0, 2, 0, 2, 3])
    assert len(readout.spoken(speech, log_probs)) == 4
    assert readout.greedy(log_probs) == [20, 20, 31]


def test_an_unsure_embedding_is_the_mean_of_what_it_may_say(readout):
    log_probs = torch.tensor([[0.1, 0.6, 0.3, 0.0]]).log()
    expected = 0.6 * readout.embeddings[0] + 0.3 * readout.embeddings[1]
    assert torch.allclose(readout.spoken(torch.zeros(1, 2), log_probs), expected[None])


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
