import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.errors import TaskError
from svbatch.language.branches import CANDIDATES
from svbatch.language.decoder_only import DecoderOnly
from svbatch.language.decoding import Question, greedy
from svbatch.language.open_answer import is_loop
from svbatch.language.scoring import score_labels

END = 31
INSTRUCTION = [11, 12, 13, 14]
MAX_TOKENS = 40


def answered(llm, prefix, instruction_ids, **how):
    [answers] = greedy(llm, prefix, [Question(instruction_ids, **how)], end_id=END)
    return answers


@pytest.fixture(scope="module")
def plain(llm, segments):
    return answered(llm, llm.read(segments), INSTRUCTION, max_tokens=MAX_TOKENS)


def same(found, expected):
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert [answer.finish_reason for answer in found] == [answer.finish_reason for answer in expected]
    sums = [torch.tensor([answer.sum_logprob for answer in answers]) for answers in (found, expected)]
    torch.testing.assert_close(*sums, atol=1e-4, rtol=0)


def test_an_answer_is_the_plain_loop_over_the_full_prompt(judge, segments, plain):
    assert [answer.finish_reason for answer in plain] == ["stop"] * 4 + ["length"] + ["stop"] * 2
    for rows, answer in zip(segments, plain, strict=True):
        said, total = judge.greedy(rows, INSTRUCTION, MAX_TOKENS)
        assert answer.ids == (said[:-1] if answer.finish_reason == "stop" else said)
        assert answer.sum_logprob == pytest.approx(total, abs=1e-3)


def test_an_answer_is_that_of_transformers_generate(judge, segments, plain):
    instruction = judge.model.get_input_embeddings()(torch.tensor(INSTRUCTION))
    for rows, answer in zip(segments, plain, strict=True):
        generated = judge.model.generate(
            inputs_embeds=torch.cat([rows, instruction])[None],
            attention_mask=torch.ones(1, len(rows) + 4, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
        )[0].tolist()
        assert generated == answer.ids + [END] * (answer.finish_reason == "stop")


def test_a_segment_is_answered_the_same_alone_and_in_any_batch(llm, segments, plain):
    alone = [answered(llm, llm.read([rows]), INSTRUCTION, max_tokens=MAX_TOKENS)[0] for rows in segments]
    backwards = answered(llm, llm.read(segments[::-1]), INSTRUCTION, max_tokens=MAX_TOKENS)
    same(alone, plain)
    same(backwards[::-1], plain)


@pytest.mark.parametrize(
    "draft_of",
    [
        lambda ids: ids,
        lambda ids: [*ids, END, 7, 8],
        lambda ids: ids[:3],
        lambda ids: [],
        lambda ids: [5] * 60,
        lambda ids: [*ids[:4], 5, *ids[5:]],
        lambda ids: ids[:4] + ids[6:],
        lambda ids: [*ids[:4], 5, 6, *ids[4:]],
        lambda ids: ids * 3,
    ],
    ids=["right", "right_and_on", "cut", "empty", "wrong", "substituted", "deleted", "inserted", "too_long"],
)
def test_a_draft_of_any_kind_changes_nothing(llm, segments, plain, draft_of):
    drafts = [draft_of(answer.ids) for answer in plain]
    found = answered(llm, llm.read(segments), INSTRUCTION, max_tokens=MAX_TOKENS, drafts=drafts)
    same(found, plain)


@settings(max_examples=15, deadline=None)
@given(
    drafts=st.lists(st.lists(st.integers(0, 299), max_size=50), min_size=7, max_size=7),
    keep=st.integers(0, 20),
)
def test_any_draft_gives_the_plain_answer(llm, segments, plain, drafts, keep):
    mixed = [answer.ids[:keep] + draft for answer, draft in zip(plain, drafts, strict=True)]
    found = answered(llm, llm.read(segments), INSTRUCTION, max_tokens=MAX_TOKENS, drafts=mixed)
    same(found, plain)


def test_a_right_draft_is_checked_in_one_pass_and_a_substitution_costs_one_more(llm, segments, plain, monkeypatch):
    passes = []
    extend = type(llm).extend
    monkeypatch.setattr(type(llm), "extend", lambda *given, **named: passes.append(1) or extend(*given, **named))
    prefix = llm.read(segments[:1])
    for draft in (plain[0].ids, [*plain[0].ids[:4], 299]):
        answered(llm, prefix, INSTRUCTION, max_tokens=MAX_TOKENS, drafts=[draft])
        passes.append(0)
    assert passes == [1, 0, 1, 1, 0]


def test_each_segment_may_have_its_own_limit(llm, segments, plain):
    limits = [1, 2, 3, 4, 5, 6, 40]
    found = answered(llm, llm.read(segments), INSTRUCTION, max_tokens=limits)
    assert [answer.ids for answer in found] == [answer.ids[:limit] for answer, limit in zip(plain, limits, strict=True)]
    assert [answer.finish_reason for answer in found] == ["length"] * 5 + ["length", "stop"]


def test_decoding_leaves_the_prefix_as_it_was_for_the_next_question(llm, segments, plain, seen_by):
    labels = [[20, END], [20, 21, END]]
    prefix = llm.read(segments)
    before = seen_by(prefix)
    scores = score_labels(llm, prefix, [15], labels)
    same(answered(llm, prefix, INSTRUCTION, max_tokens=MAX_TOKENS), plain)
    assert all(torch.equal(was, now) for was, now in zip(before, seen_by(prefix), strict=True))
    torch.testing.assert_close(score_labels(llm, prefix, [15], labels), scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("draft", [[], [14] * 50])
def test_a_loop_is_stopped_and_said_with_a_draft_and_without(build_llama, segments, draft):
    stuck = DecoderOnly(build_llama(initializer_range=0.05))
    answer = answered(stuck, stuck.read(segments[1:2]), INSTRUCTION, max_tokens=60, drafts=[draft])[0]
    assert answer.finish_reason == "loop"
    assert answer.ids == [14] * 24


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([5] * 23, False),
        ([5] * 24, True),
        ([1, 2, 3] + [5] * 24, True),
        ([5] * 24 + [1], False),
        ([5, 6] * 12, True),
        (list(range(32)) * 3, False),
        (list(range(32)) * 4, True),
        (list(range(33)) * 4, False),
        (list(range(10)) * 3 + list(range(9)), False),
        ([0, 0, 0, 0, 5, 0, 0, 0, 0], False),
        ([], False),
    ],
)
def test_a_loop_is_an_n_gram_said_four_times_in_a_row_over_24_tokens_or_more(ids, expected):
    assert is_loop(ids) is expected


@pytest.mark.parametrize(
    ("instruction", "max_tokens", "message"),
    [
        ([], 5, "instruction has no tokens"),
        ([5], 0, "max_tokens is 0"),
        ([5], [3] * 6 + [-1], "max_tokens is -1"),
    ],
)
def test_an_empty_instruction_or_limit_is_refused(llm, segments, instruction, max_tokens, message):
    with pytest.raises(ValueError, match=message):
        answered(llm, llm.read(segments), instruction, max_tokens=max_tokens)


def test_an_answer_past_the_context_is_refused_with_both_numbers(llm):
    prefix = llm.read([torch.zeros(1020, 64)])
    with pytest.raises(TaskError, match="1025 positions and the LLM holds 1024"):
        answered(llm, prefix, INSTRUCTION, max_tokens=9)


class Voter:
    """Votes by a table that depends on the token and on how many were said, of some strength."""

    def __init__(self, seed: int, strength: float) -> None:
        self._table = torch.randn(MAX_TOKENS, 300, generator=torch.Generator().manual_seed(seed)) * strength
        self._num_said = 0

    def weigh(self, tokens):
        return self._table[self._num_said, torch.tensor(tokens)].tolist()

    def follow(self, token):
        self._num_said += 1


def voted(llm, segments, strength, drafts=None):
    voters = [Voter(row, strength) for row in range(len(segments))]
    prefix = llm.read(segments)
    return answered(llm, prefix, INSTRUCTION, max_tokens=MAX_TOKENS, drafts=drafts, voters=voters)


def test_a_voter_without_an_opinion_changes_nothing(llm, segments, plain):
    same(voted(llm, segments, 0.0), plain)


def test_a_token_has_the_highest_sum_of_llm_and_voter_among_the_llms_likeliest(llm, segments, judge):
    answers = voted(llm, segments, 2.0)
    for row, (rows, answer) in enumerate(zip(segments, answers, strict=True)):
        voter = Voter(row, 2.0)
        for step, token in enumerate(answer.ids[:8]):
            logprobs = judge.log_probabilities(rows, [*INSTRUCTION, *answer.ids[:step]])[-1]
            tokens = [*logprobs.topk(CANDIDATES).indices.tolist(), END]
            sums = [float(logprobs[t]) + vote for t, vote in zip(tokens, voter.weigh(tokens), strict=True)]
            assert token == tokens[sums.index(max(sums))]
            voter.follow(token)


def test_a_draft_changes_no_answer_that_a_voter_has_a_say_in(llm, segments, plain):
    answers = voted(llm, segments, 2.0)
    assert [answer.ids for answer in answers] != [answer.ids for answer in plain]
    for drafts in ([a.ids for a in answers], [a.ids for a in plain], [[5, 6, 7]] * len(segments)):
        same(voted(llm, segments, 2.0, drafts), answers)


class Only:
    """A guide that lets nothing be said but these tokens, and then the end."""

    def __init__(self, ids):
        self.ids = [*ids, END]

    def allowed(self):
        mask = torch.zeros(300, dtype=torch.bool)
        mask[self.ids[0]] = True
        return mask

    def follow(self, token):
        assert self.ids.pop(0) == token


def test_questions_asked_together_are_answered_as_each_alone(llm, segments, plain):
    prefix = llm.read(segments)
    others = [[20, 21], [25]]
    alone = [answered(llm, prefix, other, max_tokens=MAX_TOKENS) for other in others]
    assert len({len(answer.ids) for own in [plain, *alone] for answer in own}) > 3  # they leave at different times
    dictated = [[40 + row] * (1 + row) for row in range(len(segments))]
    questions = [
        Question(INSTRUCTION, MAX_TOKENS),
        Question([22, 23, 24], MAX_TOKENS, guides=[Only(ids) for ids in dictated]),
        *(Question(other, MAX_TOKENS) for other in others),
    ]
    together = greedy(llm, prefix, questions, end_id=END)
    same(together[0], plain)
    assert [answer.ids for answer in together[1]] == dictated
    for found, expected in zip(together[2:], alone, strict=True):
        same(found, expected)
    same(answered(llm, prefix, INSTRUCTION, max_tokens=MAX_TOKENS), plain)  # the prefix can be asked again


def test_refused_drafts_leave_gaps_that_no_answer_sees(llm, segments, plain):
    prefix = llm.read(segments)
    other = answered(llm, prefix, [20, 21], max_tokens=MAX_TOKENS)
    half_right = [[*answer.ids[:3], 299, *answer.ids[3:]] for answer in other]
    questions = [
        Question(INSTRUCTION, MAX_TOKENS, drafts=[[299] * 5 for _ in plain]),
        Question([20, 21], MAX_TOKENS, drafts=half_right),
        Question([20, 21], MAX_TOKENS),
    ]
    together = greedy(llm, prefix, questions, end_id=END)
    for found, expected in zip(together, [plain, other, other], strict=True):
        same(found, expected)
