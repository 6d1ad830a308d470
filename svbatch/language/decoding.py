"""Open answers: greedy decoding over a batch, all questions together, with a draft where one exists."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from svbatch.language import branches
from svbatch.language.guide import Guide
from svbatch.language.llm import LanguageModel, Prefix
from svbatch.language.open_answer import Draft, FinishReason, OpenAnswer, Voter


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

    Where the LLM `shares_questions`, all answers are written side by side: branches of what was read, which is kept
    once for all of them. Questions with voters are asked alone. The prefix can be asked again afterwards. Raises
    ValueError for an empty instruction or a limit below 1, TaskError where the LLM's context is too short.
    """
    assert len(questions) == 1 or not any(question.voters for question in questions)
    answers = [_unanswered(question, prefix.batch_size, end_id) for question in questions]
    together = [range(len(questions))] if llm.shares_questions else [[number] for number in range(len(questions))]
    for numbers in together if questions else []:
        for number in numbers:
            asked = llm.ask(prefix, questions[number].instruction_ids)
            for answer in answers[number]:
                answer.unread = list(asked.unread)
        by_row = [[answers[number][row] for number in numbers] for row in range(prefix.batch_size)]
        branches.write(llm, asked.cache, asked.lengths, by_row)
    return [
        [Decoded(one.ids, one.logprobs, one.sum_logprob, one.finish_reason or "length") for one in own]
        for own in answers
    ]


def _unanswered(question: Question, num_segments: int, end_id: int) -> list[OpenAnswer]:
    if not question.instruction_ids:
        raise ValueError("the instruction has no tokens, so nothing comes right before the answer")
    limit = question.max_tokens
    limits = [limit] * num_segments if isinstance(limit, int) else limit
    if min(limits) < 1:
        raise ValueError(f"max_tokens is {min(limits)}; an answer needs at least 1")
    nothing: list[list[int]] = [[]] * num_segments
    nobody = [None] * num_segments
    return [
        OpenAnswer(end_id, limit, Draft(list(guess)), guide=guide, voter=voter)
        for limit, guess, guide, voter in zip(
            limits, question.drafts or nothing, question.guides or nobody, question.voters or nobody, strict=True
        )
    ]
