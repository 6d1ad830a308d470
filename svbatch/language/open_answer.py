"""One answer in the making: what was said, how much of a draft is used up, and when it has to end.

A draft is a guess of the answer. One pass reads all of it, and what the LLM would have said itself is kept:
every token in a result is the LLM's own choice after the tokens before it, so a draft changes the time and
not the text.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from svbatch.errors import TaskError
from svbatch.language.guide import Guide

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


class Voter(Protocol):
    """A second opinion on each next token of one answer, added to the LLM's log-probability."""

    def weigh(self, tokens: Sequence[int]) -> Sequence[float]:
        """What speaks for each token after those that were followed."""

    def follow(self, token: int) -> None:
        """The answer goes on with one of the tokens that were weighed last."""


@dataclass
class Draft:
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
class OpenAnswer:
    """An answer in the making. `unread`: the tokens that come next and are not in the cache yet. `slots`: where those
    that the cache holds are, counted from the end of the prefix."""

    end_id: int
    max_tokens: int
    draft: Draft
    unread: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    guide: Guide | None = None
    voter: Voter | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sum_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    @property
    def is_open(self) -> bool:
        """Whether it goes on."""
        return self.finish_reason is None

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
        if not self.is_open:
            return 0
        num_before = len(self.ids)
        num_kept = len(self.unread)
        for step, (tokens, logprobs) in enumerate(choices):
            choice, logprob = self._choose(tokens, logprobs)
            self._say(choice, logprob)
            if not self.is_open:
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
