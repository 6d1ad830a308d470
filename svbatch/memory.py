"""What asking a batch takes in memory beside the model, estimated before it is run, and batches that stay within it.

Counted: keys and values of every position, what a pass holds between two layers, and the logits made at a time. Keys
and values are there twice while open questions are answered: rows that are finished leave, and the prefix stays.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from svbatch.generate import is_transcript
from svbatch.hear import Hearing
from svbatch.language.cache import slots_for
from svbatch.language.llm import MAX_LOGITS
from svbatch.language.scoring import packed_tokens
from svbatch.model import Model
from svbatch.tasks import prompts
from svbatch.tasks.task import Task

OPEN_TOKENS = 32  # of an open answer, in the mean
LOGIT_BYTES = 26  # measured: as it is made, in float32, on the way to their sum, and the product's own workspace


@dataclass(frozen=True)
class Questions:
    """Tokens of the longest closed question with those of its labels, of all closed ones, and of all open ones that are
    asked side by side; 0 for none. And how many the last are."""

    longest_closed: int
    closed_tokens: int
    open_tokens: int
    num_open: int


def questions_of(tasks: Sequence[Task], model: Model) -> Questions:
    """What is asked of every segment."""
    tokens: dict[bool, list[int]] = {True: [0], False: [0]}
    for task in tasks:
        if is_transcript(task, model):
            continue
        labels = sum(len(prompts.answer_ids(model.tokenizer, label)) - 1 for label in task.scored)
        for question in task.questions():
            tokens[task.is_closed].append(len(prompts.question_ids(model.tokenizer, question)) + labels)
    opened = tokens[False]
    if model.llm.shares_questions:
        return Questions(max(tokens[True]), sum(tokens[True]), sum(opened), len(opened) - 1)
    return Questions(max(tokens[True]), sum(tokens[True]), max(opened), min(1, len(opened) - 1))


def room_for(questions: Questions, rows: int) -> int:
    """Positions that closed questions of so many segments take beside their prefix; open ones are written elsewhere."""
    return max(questions.longest_closed, min(questions.closed_tokens, packed_tokens(rows)))


def prefix_lengths(hearings: Sequence[Hearing], model: Model) -> list[int]:
    """Positions of each hearing's prefix; what an LLM will have written is guessed to be as long as the read-out."""
    opening = len(prompts.opening_ids(model.tokenizer))
    heading = len(prompts.transcript_ids(model.tokenizer, ""))
    texts = [
        len(prompts.transcript_ids(model.tokenizer, h.text)) if h.transcript else heading + len(h.read)
        for h in hearings
    ]
    return [opening + len(hearing.speech) + text for hearing, text in zip(hearings, texts, strict=True)]


def asking_bytes(questions: Questions, lengths: Sequence[int], model: Model) -> int:
    """The most that is held at once while `questions` are asked of segments whose prefixes have these lengths."""
    rows, longest = len(lengths), max(lengths)
    llm = model.llm
    packed = room_for(questions, rows)
    closed = packed * rows * llm.bytes_per_position + min(MAX_LOGITS, rows * packed * llm.vocab_size // 4) * LOGIT_BYTES
    written = questions.open_tokens + questions.num_open * OPEN_TOKENS
    opened = slots_for(longest + written) * rows * llm.bytes_per_slot
    opened += questions.open_tokens * rows * llm.bytes_per_position
    opened += min(MAX_LOGITS, rows * questions.num_open * llm.vocab_size) * LOGIT_BYTES
    return slots_for(longest + packed) * rows * llm.bytes_per_slot + max(closed, opened if questions.num_open else 0)


def fitting(questions: Questions, lengths: Sequence[int], model: Model, max_bytes: int) -> Iterator[slice]:
    """Segments in order, as many at a time as stay within `max_bytes`, at least one."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        is_last = stop == len(lengths)
        if is_last or asking_bytes(questions, lengths[start : stop + 1], model) > max_bytes:
            yield slice(start, stop)
            start = stop
