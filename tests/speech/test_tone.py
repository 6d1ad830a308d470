import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.hear import Span, hear
from svbatch.speech.tone import ToneHead, word_embedding


@pytest.fixture(scope="module")
def head() -> ToneHead:
    torch.manual_seed(0)
    head = ToneHead(frame_width=12, num_labels=(3, 2), llm_width=8).eval().requires_grad_(False)
    head.words.normal_()
    return head


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_what_stands_past_a_rows_end_or_beside_it_changes_nothing(head, lengths, seed):
    rows = [torch.randn(length, 12, generator=torch.Generator().manual_seed(seed + length)) for length in lengths]
    batch = torch.full((len(rows), max(lengths), 12), 1e3)
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    together, log_probs = head(batch, torch.tensor(lengths))
    assert log_probs.shape == (len(rows), 5)
    assert together.shape == (len(rows), 2, 8)
    for own, row in zip(together, rows, strict=True):
        torch.testing.assert_close(own, head(row[None], torch.tensor([len(row)]))[0][0], atol=1e-4, rtol=0)


def test_a_sure_answer_is_the_labels_own_word_and_an_unsure_one_lies_between(head):
    frames, lengths = torch.randn(1, 40, 12), torch.tensor([40])
    probabilities = [part.softmax(dim=1)[0] for part in head.logits(frames, lengths).split((3, 2), dim=1)]
    embeddings, log_probs = head(frames, lengths)
    given = embeddings[0]
    torch.testing.assert_close(log_probs[0].exp(), torch.cat(probabilities))
    torch.testing.assert_close(given[0], probabilities[0] @ head.words[:3])
    torch.testing.assert_close(given[1], probabilities[1] @ head.words[3:])


def test_a_label_of_several_tokens_is_the_mean_of_theirs():
    embeddings = torch.arange(12.0).reshape(4, 3)
    torch.testing.assert_close(word_embedding([0, 2], embeddings), (embeddings[0] + embeddings[2]) / 2)


def test_the_tone_stands_before_what_was_read_in_what_the_llm_is_given(tiny_model, tiny_parts, bursts):
    [hearing] = hear([Span(bursts(2.0, seed=1), 0.0, transcribed=False)], tiny_model)
    words = tiny_parts.projector.tone.words
    for place, own in zip(hearing.speech[:2], words.split((4, 2)), strict=True):
        weights = torch.linalg.lstsq(own.T, place[:, None]).solution[:, 0]  # a mixture of the attribute's own words
        torch.testing.assert_close(weights @ own, place, atol=1e-2, rtol=0)
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-2)
        assert float(weights.min()) > -1e-2
