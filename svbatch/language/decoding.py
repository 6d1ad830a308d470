"""Open answers: greedy decoding over a batch, with a draft where one exists, and a guard against loops.

A draft is a guess of the answer. One pass reads all of it, and what the LLM would have said itself is kept:
every token in a result is the LLM's own choice after the tokens before it, so a draft changes the time and
not the text.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svbatch.errors import TaskError
from svbatch.language.cache import closed_up
from svbatch.language.guide import Guide
from svbatch.language.llm import Cache, LanguageModel, Prefix

FinishReason = Literal["stop", "length", "loop", "grammar"]

LOOP_REPEATS = 4
LOOP_TOKENS = 24
LOOP_MAX_NGRAM = 32
"""An answer loops when it ends in one n-gram of at most LOOP_MAX_NGRAM tokens, said at least LOOP_REPEATS
times in a row over at least LOOP_TOKENS tokens: "no no no no" is speech, 24 times "no" is not."""

REDRAFT_TOKENS = 4
"""After a refused token, so much of the rest of the draft is tried; twice as much each time that all held."""

REALIGN_TOKENS = 16
"""How far from the place of a refused token the draft is searched for what the LLM said last."""


CANDIDATES = 16
"""How many of the LLM's likeliest tokens a voter chooses among, beside the end of the turn."""


class Voter(Protocol):
    """A second opinion on each next token of one answer, added to the LLM's log-probability."""

    def weigh(self, tokens: Sequence[int]) -> Sequence[float]:
        """What speaks for each token after those that were followed."""

    def follow(self, token: int) -> None:
        """The answer goes on with one of the tokens that were weighed last."""


@dataclass(frozen=True)
class Decoded:
    """One answer. `ids` are without the end of the turn; a looping answer keeps its repeats. `logprobs`: of each.

    sum_logprob: natural log, over `ids` and the end of the turn if the LLM said it. finish_reason: "stop" (the LLM
    ended its turn), "length" (it was cut at max_tokens), "loop" (it was stopped repeating itself), "grammar" (its
    guide could not follow it any further).
    """

    ids: list[int]
    logprobs: list[float]
    sum_logprob: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class Question:
    """One instruction for every segment of a prefix.

    max_tokens: the most that is said, the end of the turn included, for all or for each segment. drafts: a
    guess of each answer (empty for none). guides: what each answer may be; then there are no drafts. voters:
    what speaks for a token beside the LLM, for each answer; then there are no guides.
    """

    instruction_ids: Sequence[int]
    max_tokens: Sequence[int] | int
    drafts: Sequence[Sequence[int]] | None = None
    guides: Sequence[Guide] | None = None
    voters: Sequence[Voter] | None = None


@torch.inference_mode()
def greedy(llm: LanguageModel, prefix: Prefix, questions: Sequence[Question], *, end_id: int) -> list[list[Decoded]]:
    """Each segment's answer to each question, taking the likeliest token at every step.

    Each instruction is read on its own, then the answers to all of them are written in one batch, which the finished
    ones leave: a step of few rows costs nearly as much as one of many. Questions with voters are asked alone. The
    prefix can be asked again afterwards. Raises ValueError for an empty instruction or a limit below 1, TaskError
    where the LLM's context is too short.
    """
    assert len(questions) == 1 or not any(question.voters for question in questions)
    answers = [_unanswered(question, prefix.batch_size, end_id) for question in questions]
    begun = [
        _begun(llm, prefix, question.instruction_ids, own) for question, own in zip(questions, answers, strict=True)
    ]
    if going := [each for each in begun if each is not None]:
        cache, lengths = _stacked([(cache, lengths) for cache, lengths in going])
        _finish(llm, cache, lengths, [one for own in answers for one in own if one.finish_reason is None])
    return [
        [Decoded(one.ids, one.logprobs, one.sum_logprob, one.finish_reason or "length") for one in own]
        for own in answers
    ]


def _unanswered(question: Question, num_segments: int, end_id: int) -> "list[_Answer]":
    if not question.instruction_ids:
        raise ValueError("the instruction has no tokens, so nothing comes right before the answer")
    limit = question.max_tokens
    limits = [limit] * num_segments if isinstance(limit, int) else limit
    if min(limits) < 1:
        raise ValueError(f"max_tokens is {min(limits)}; an answer needs at least 1")
    nothing: list[list[int]] = [[]] * num_segments
    nobody = [None] * num_segments
    return [
        _Answer(end_id, limit, _Draft(list(guess)), guide=guide, voter=voter)
        for limit, guess, guide, voter in zip(
            limits, question.drafts or nothing, question.guides or nobody, question.voters or nobody, strict=True
        )
    ]


def _begun(
    llm: LanguageModel, prefix: Prefix, instruction_ids: Sequence[int], answers: "Sequence[_Answer]"
) -> tuple[Cache, Tensor] | None:
    """The first pass over all answers to one instruction; the cache and lengths of those that go on, a copy because
    the prefix will be asked again. None if all are finished."""
    asked = llm.ask(prefix, instruction_ids)
    for answer in answers:
        answer.unread = list(asked.unread)
    lengths = _advance(llm, asked.cache, asked.lengths, answers)
    rows = torch.tensor(_open_rows(answers), dtype=torch.int64, device=llm.device)
    return (asked.cache.select(rows), lengths[rows]) if len(rows) else None


def _stacked(parts: Sequence[tuple[Cache, Tensor]]) -> tuple[Cache, Tensor]:
    caches, lengths = [cache for cache, _ in parts], torch.cat([lengths for _, lengths in parts])
    if len(caches) == 1:
        return caches[0], lengths
    return type(caches[0]).stacked(caches, int(lengths.max())), lengths


def _finish(llm: LanguageModel, cache: Cache, lengths: Tensor, answers: "list[_Answer]") -> None:
    """Goes on until all are finished; those that are leave the batch."""
    while answers:
        lengths = _advance(llm, cache, lengths, answers)
        rows = closed_up(_open_rows(answers))
        if len(rows) < len(answers):
            answers = [answers[row] for row in rows]
            kept = torch.tensor(rows, dtype=torch.int64, device=llm.device)
            lengths = lengths[kept]
            cache.keep(kept)


def _open_rows(answers: "Sequence[_Answer]") -> list[int]:
    return [row for row, answer in enumerate(answers) if answer.finish_reason is None]


@dataclass
class _Draft:
    """A guess of the whole answer, and how far the answer has used it up."""

    ids: list[int]
    position: int = 0
    reach: int = sys.maxsize
    """How many tokens to propose at once: all, until one was refused."""

    def proposal(self, room: int) -> list[int]:
        return self.ids[self.position : self.position + min(self.reach, room)]

    def follow(self, said: list[int], num_new: int) -> None:
        """Moves behind what the LLM said last: the `num_new` last tokens of `said`."""
        if self.ids[self.position : self.position + num_new] == said[-num_new:]:
            self.position += num_new
            self.reach *= 2
        else:
            self.position = self._realigned(said, self.position + num_new)
            self.reach = REDRAFT_TOKENS

    def _realigned(self, said: list[int], expected: int) -> int:
        """The place in the draft before which it agrees longest with the end of `said`, near `expected`.

        `expected` takes the refused token for a substitution, and wins where nothing agrees better.
        """
        nearby = range(max(1, expected - REALIGN_TOKENS), min(len(self.ids), expected + REALIGN_TOKENS) + 1)
        return max(
            nearby,
            key=lambda place: (_agreement(self.ids, place, said), -abs(place - expected)),
            default=expected,
        )


def _agreement(draft: list[int], place: int, said: list[int]) -> int:
    """How many tokens before `place` in the draft are the last ones said."""
    longest = min(place, len(said), REALIGN_TOKENS)
    return next((n for n in range(longest) if draft[place - 1 - n] != said[-1 - n]), longest)


@dataclass
class _Answer:
    """An answer in the making. `unread`: the tokens that come next and are not in the cache yet."""

    end_id: int
    max_tokens: int
    draft: _Draft
    unread: list[int] = field(default_factory=list)
    guide: Guide | None = None
    voter: Voter | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sum_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    def allowed(self, vocab_size: int) -> Tensor:
        """(V,) bool: what may come next. All of it where there is no guide, or it is lost, which ends the answer."""
        if self.guide is not None:
            try:
                return self.guide.allowed()
            except TaskError:
                self.finish_reason = "grammar"
        return torch.ones(vocab_size, dtype=torch.bool)

    def proposal(self) -> list[int]:
        """The draft's next tokens; one less than may still be said, because the LLM adds one of its own."""
        return self.draft.proposal(self.max_tokens - len(self.ids) - 1)

    def accept(self, proposal: list[int], choices: list[tuple[list[int], list[float]]]) -> int:
        """Takes the choices up to the first that the proposal did not foresee.

        choices: candidates with log-probabilities, the LLM's own choice first, after `unread` and after each
        proposed token. Returns how many of `unread + proposal` now belong to the answer's prompt, so stay in
        the cache.
        """
        if self.finish_reason is not None:
            return 0
        num_before = len(self.ids)
        num_kept = len(self.unread)
        for step, (tokens, logprobs) in enumerate(choices):
            choice, logprob = self._choose(tokens, logprobs)
            self._say(choice, logprob)
            if self.finish_reason is not None:
                return num_kept
            if step == len(proposal) or choice != proposal[step]:
                break
            num_kept += 1
        self.unread = [self.ids[-1]]
        self.draft.follow(self.ids, len(self.ids) - num_before)
        return num_kept

    def _choose(self, tokens: list[int], logprobs: list[float]) -> tuple[int, float]:
        if self.voter is None:
            return tokens[0], logprobs[0]
        votes = self.voter.weigh(tokens)
        best = max(range(len(tokens)), key=lambda i: logprobs[i] + votes[i])
        return tokens[best], logprobs[best]

    def _say(self, token: int, logprob: float) -> None:
        self.sum_logprob += logprob
        if token == self.end_id:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        self.logprobs.append(logprob)
        try:
            for follower in (self.guide, self.voter):
                if follower is not None:
                    follower.follow(token)
        except TaskError:
            self.finish_reason = "grammar"
            return
        if is_loop(self.ids):
            self.finish_reason = "loop"
        elif len(self.ids) == self.max_tokens:
            self.finish_reason = "length"


def is_loop(ids: Sequence[int]) -> bool:
    """Whether the ids end in an n-gram said over and over (LOOP_REPEATS, LOOP_TOKENS, LOOP_MAX_NGRAM)."""
    for n in range(1, LOOP_MAX_NGRAM + 1):
        span = max(LOOP_REPEATS * n, LOOP_TOKENS)
        if span > len(ids):
            break
        if ids[-1] == ids[-1 - n] and ids[-span + n :] == ids[-span:-n]:
            return True
    return False


def _advance(llm: LanguageModel, cache: Cache, lengths: Tensor, answers: Sequence[_Answer]) -> Tensor:
    """One pass over what each answer has not read yet and its draft's proposal; returns the rows' new
    lengths."""
    proposals = [answer.proposal() for answer in answers]
    blocks = [answer.unread + proposal for answer, proposal in zip(answers, proposals, strict=True)]
    ids = pad_sequence([torch.tensor(block) for block in blocks], batch_first=True).to(llm.device)
    num_tokens = ids.shape[1]
    hidden = llm.extend(
        cache,
        lengths,
        llm.embed(ids),
        depths=torch.arange(num_tokens, device=llm.device),
        visible=torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=llm.device).tril(),
    )
    spans = [(len(answer.unread) - 1, len(block)) for answer, block in zip(answers, blocks, strict=True)]
    used = torch.cat([hidden[row, first:last] for row, (first, last) in enumerate(spans)])
    if answers[0].voter is None:
        tokens, logprobs = (each[:, None] for each in llm.choose(used, _allowed(answers, proposals, llm.vocab_size)))
    else:
        tokens, logprobs = llm.candidates(used, count=CANDIDATES, always=answers[0].end_id)
    said = iter(zip(tokens.tolist(), logprobs.tolist(), strict=True))
    num_kept = [
        answer.accept(proposal, list(islice(said, len(proposal) + 1)))
        for answer, proposal in zip(answers, proposals, strict=True)
    ]
    return lengths + torch.tensor(num_kept, device=llm.device)


def _allowed(answers: Sequence[_Answer], proposals: Sequence[Sequence[int]], vocab_size: int) -> Tensor | None:
    """(P, V) bool: what may come next at each place where a token is chosen; None where anything may."""
    if all(answer.guide is None for answer in answers):
        return None
    rows = [
        answer.allowed(vocab_size).expand(len(proposal) + 1, -1)
        for answer, proposal in zip(answers, proposals, strict=True)
    ]
    return torch.cat(rows)
