"""Answers to several questions about each segment, written side by side.

They are branches of what was read: the prefix's keys and values are there once, every answer's tokens come after them
in whatever slots are free, and each token sees the prefix and its own answer. A pass goes over the next tokens of all
answers that are not finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from svbatch.language.cache import closed_up
from svbatch.language.llm import Cache, LanguageModel
from svbatch.language.new_tokens import NewTokens
from svbatch.language.open_answer import OpenAnswer

CANDIDATES = 16
"""How many of the LLM's likeliest tokens a voter chooses among, beside the end of the turn."""


ROOM = 64
"""Slots that are free at first for what comes after the questions and their drafts."""


@dataclass(frozen=True)
class _Block:
    """The next tokens of one answer, read in one pass: those it has not read yet, then its draft's proposal."""

    answer: OpenAnswer
    row: int
    place: int
    """Of its first token among the row's new ones."""
    proposal: list[int]

    @property
    def ids(self) -> list[int]:
        return self.answer.unread + self.proposal


def write(llm: LanguageModel, cache: Cache, starts: Tensor, answers: Sequence[Sequence[OpenAnswer]]) -> None:
    """Goes on until all `answers` of each row are finished, in a copy of the `cache`, which may be asked again; a row's
    answers follow its first `starts[b]` positions. starts: (B,) int64."""
    lengths = starts
    first = max(sum(len(each.unread) + len(each.proposal()) for each in own) for own in answers)
    cache = cache.copied(int(starts.max()) + first + ROOM)
    while answers:
        lengths = _advance(llm, cache, starts, lengths, answers)
        rows = closed_up([row for row, own in enumerate(answers) if any(each.is_open for each in own)])
        if len(rows) < len(answers):
            answers = [answers[row] for row in rows]
            kept = torch.tensor(rows, dtype=torch.int64, device=llm.device)
            starts, lengths = starts[kept], lengths[kept]
            cache.keep(kept)


def _advance(
    llm: LanguageModel, cache: Cache, starts: Tensor, lengths: Tensor, answers: Sequence[Sequence[OpenAnswer]]
) -> Tensor:
    """One pass over each open answer's block; returns where the rows' next tokens go."""
    blocks = list(_blocks(answers))
    firsts, before = starts.tolist(), lengths.tolist()
    ids = torch.tensor([token for block in blocks for token in block.ids])
    hidden = llm.extend(cache, lengths, llm.embed(ids), _new_tokens(blocks, firsts, before, llm.device))
    used = []
    end = 0
    for block in blocks:
        first, end = end + len(block.answer.unread) - 1, end + len(block.ids)
        used.append(hidden[first:end])
    said = iter(_choices(llm, torch.cat(used), blocks))
    ends = before.copy()
    for block in blocks:
        num_kept = block.answer.accept(block.proposal, list(islice(said, len(block.proposal) + 1)))
        slot = before[block.row] + block.place
        block.answer.slots += range(slot - firsts[block.row], slot - firsts[block.row] + num_kept)
        if num_kept:
            ends[block.row] = slot + num_kept
    return torch.tensor(ends, device=llm.device)


def _blocks(answers: Sequence[Sequence[OpenAnswer]]) -> Iterator[_Block]:
    for row, own in enumerate(answers):
        place = 0
        for answer in own:
            if answer.is_open:
                block = _Block(answer, row, place, answer.proposal())
                yield block
                place += len(block.ids)


def _new_tokens(
    blocks: Sequence[_Block], firsts: Sequence[int], ends: Sequence[int], device: torch.device
) -> NewTokens:
    """Where the blocks' tokens stand and what they see: the prefix, and what there is of their own answer. `firsts`,
    `ends`: of each row, where answers begin, and where the next token goes."""
    counts = [0] * len(firsts)
    for block in blocks:
        counts[block.row] += len(block.ids)
    new = NewTokens.lines(counts, device)
    is_single = len(blocks) == len(firsts)  # every row has an open answer
    if is_single and all(ends[b.row] - firsts[b.row] == len(b.answer.slots) for b in blocks):
        return new
    depths = torch.zeros(len(counts), new.most, dtype=torch.int64)
    owners = torch.full((len(counts), new.most), -1)
    earlier = (torch.arange(max(ends)) < torch.tensor(firsts)[:, None])[:, None].repeat(1, new.most, 1)
    for number, block in enumerate(blocks):
        first, slots = firsts[block.row], torch.tensor(block.answer.slots, dtype=torch.int64)
        places = slice(block.place, block.place + len(block.ids))
        owners[block.row, places] = number
        depths[block.row, places] = torch.arange(len(block.ids)) + first + len(slots) - ends[block.row]
        earlier[block.row, places, first + slots] = True
    of_same = (owners[:, :, None] == owners[:, None]).to(device)
    return replace(new, depths=depths.to(device), visible=new.visible & of_same, earlier=earlier.to(device))


def _choices(llm: LanguageModel, used: Tensor, blocks: Sequence[_Block]) -> Iterator[tuple[list[int], list[float]]]:
    """Candidates for each next token, the likeliest first, with their log-probabilities."""
    if blocks[0].answer.voter is None:
        tokens, logprobs = (each[:, None] for each in llm.choose(used, _allowed(blocks, llm.vocab_size)))
    else:
        tokens, logprobs = llm.candidates(used, count=CANDIDATES, always=blocks[0].answer.end_id)
    return zip(tokens.tolist(), logprobs.tolist(), strict=True)


def _allowed(blocks: Sequence[_Block], vocab_size: int) -> Tensor | None:
    """(P, V) bool: what may come next at each place where a token is chosen; None where anything may."""
    if all(block.answer.guide is None for block in blocks):
        return None
    return torch.cat([b.answer.allowed(vocab_size).expand(len(b.proposal) + 1, -1) for b in blocks])
