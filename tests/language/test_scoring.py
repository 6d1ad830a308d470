import pytest
import torch
from torch import Tensor

from svbatch.errors import TaskError
from svbatch.language.decoder_only import DecoderOnly
from svbatch.language.scoring import MAX_PACKED_TOKENS, score_labels, score_many

END = 31
INSTRUCTION = [11, 12, 13, 14]
LABELS = [
    [20, END],
    [20, 21, END],  # the first is its prefix
    [20, 21, 22, END],
    [30, 34, 32, 33, END],
    [30, 34, 40, END],
    [END],  # the end of the turn at once
    [30, 34, 40, END],  # a label given twice
]


def scores_of_judge(judge, segments, instruction, labels) -> Tensor:
    return torch.tensor([[judge.label_score(rows, instruction, label) for label in labels] for rows in segments])


def test_a_label_scores_the_sum_of_its_tokens_in_a_plain_forward_pass(llm, judge, segments):
    scores = score_labels(llm, llm.read(segments), INSTRUCTION, LABELS)
    expected = scores_of_judge(judge, segments, INSTRUCTION, LABELS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_a_segment_scores_the_same_alone_and_in_any_batch(llm, segments):
    together = score_labels(llm, llm.read(segments), INSTRUCTION, LABELS)
    backwards = score_labels(llm, llm.read(segments[::-1]), INSTRUCTION, LABELS)
    alone = torch.cat([score_labels(llm, llm.read([rows]), INSTRUCTION, LABELS) for rows in segments])
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, together, atol=1e-4, rtol=0)


def test_questions_packed_in_one_pass_score_as_each_alone(llm, segments):
    questions = [(INSTRUCTION, LABELS), ([15], [[9, END], [8, 7, END]]), ([16, 17], [[20, END]]), ([15], [])]
    prefix = llm.read(segments)
    packed = score_many(llm, prefix, questions)
    assert [scores.shape for scores in packed] == [(7, 7), (7, 2), (7, 1), (7, 0)]
    for scores, (instruction, labels) in zip(packed, questions, strict=True):
        alone = score_labels(llm, llm.read(segments), instruction, labels)
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=0)


def test_more_questions_than_one_pass_holds_are_all_scored(llm, judge, segments):
    questions = [([5 + n] * 60, LABELS) for n in range(6)]
    assert MAX_PACKED_TOKENS < 6 * 60
    scores = score_many(llm, llm.read(segments[:2]), questions)
    for found, (instruction, labels) in zip(scores, questions, strict=True):
        expected = scores_of_judge(judge, segments[:2], instruction, labels)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_three_hundred_labels_are_scored_in_one_question(llm, judge, segments):
    generator = torch.Generator().manual_seed(3)
    labels = [[*torch.randint(3, 300, (1 + n % 4,), generator=generator).tolist(), END] for n in range(300)]
    scores = score_labels(llm, llm.read(segments[:1]), INSTRUCTION, labels)
    expected = scores_of_judge(judge, segments[:1], INSTRUCTION, labels)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_the_probabilities_of_all_single_tokens_sum_to_one(llm, segments):
    scores = score_labels(llm, llm.read(segments), INSTRUCTION, [[token] for token in range(300)])
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(7), atol=1e-4, rtol=0)


def test_scoring_leaves_the_prefix_as_it_was(llm, segments, seen_by):
    prefix = llm.read(segments)
    before = seen_by(prefix)
    first = score_labels(llm, prefix, INSTRUCTION, LABELS)
    score_many(llm, prefix, [([15] * 70, LABELS)])
    again = score_labels(llm, prefix, INSTRUCTION, LABELS)
    assert all(torch.equal(was, now) for was, now in zip(before, seen_by(prefix), strict=True))
    torch.testing.assert_close(again, first, atol=1e-5, rtol=0)


def test_bfloat16_mostly_puts_the_labels_in_the_same_order(llm, build_llama, segments):
    labels = [[token, END] for token in range(20, 60)]
    exact = score_labels(llm, llm.read(segments), INSTRUCTION, labels)
    rounded_llm = DecoderOnly(build_llama().to(torch.bfloat16))
    rounded = score_labels(rounded_llm, rounded_llm.read(segments), INSTRUCTION, labels)
    pairs_exact = exact[:, :, None] > exact[:, None, :]
    pairs_rounded = rounded[:, :, None] > rounded[:, None, :]
    assert (pairs_exact == pairs_rounded).float().mean() > 0.97


@pytest.mark.parametrize(
    ("instruction", "labels", "message"),
    [
        ([], [[END]], "instruction has no tokens"),
        ([5], [[END], []], "label 1 has no tokens"),
    ],
)
def test_an_empty_instruction_or_label_is_refused(llm, segments, instruction, labels, message):
    with pytest.raises(ValueError, match=message):
        score_labels(llm, llm.read(segments), instruction, labels)


def test_an_instruction_past_the_context_is_refused_with_both_numbers(llm, segments):
    with pytest.raises(TaskError, match="1064 positions and the LLM holds 1024"):
        score_labels(llm, llm.read(segments), [5] * 1024, [[END]])


def test_what_questions_begin_with_alike_is_read_once(llm, judge, segments, monkeypatch):
    read = []
    extend = llm.extend
    monkeypatch.setattr(llm, "extend", lambda *args, **kwargs: read.append(len(args[2])) or extend(*args, **kwargs))
    questions = [([7, 8, 9, 10], LABELS), ([7, 8, 9], [[10, END], [12, END]]), ([7, 8], LABELS), ([8, 9], LABELS)]
    scores = score_many(llm, llm.read(segments[:2]), questions)
    for found, (instruction, labels) in zip(scores, questions, strict=True):
        expected = scores_of_judge(judge, segments[:2], instruction, labels)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    if llm.shares_questions:
        inner = {tuple(label[:n]) for label in LABELS for n in range(1, len(label))}
        assert read == [2 * (4 + 1 + 2 + 3 * len(inner))]
