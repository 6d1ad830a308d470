"""Questions about spans that were heard: what was heard is read by the LLM once, every question goes on from there."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from svbatch.errors import TaskError
from svbatch.generate import (
    MAX_TOKENS,
    Answer,
    Unanswered,
    guides_of,
    open_answers,
    transcript_answer,
    with_transcripts,
)
from svbatch.hear import Hearing
from svbatch.language.prefix import Prefix, prefill
from svbatch.model import Model
from svbatch.score import closed_answers
from svbatch.tasks import prompts
from svbatch.tasks.task import Task
from svbatch.timing import part

Mode = Literal["audio", "text", "both"]
MAX_PREFIX_TOKENS = 800  # 30 s of speech are at most 375 embeddings, a transcript 400 tokens


def ask(tasks: Sequence[Task], hearings: Sequence[Hearing], model: Model) -> dict[str, list[Answer | Unanswered]]:
    """Each task's answers to `hearings`, by the task's name and in their order."""
    answers: dict[str, list[Answer | Unanswered]] = {task.name: [] for task in tasks}
    if not hearings:
        return answers
    if model.recogniser is None and any(mode_of(task) != "audio" for task in tasks):
        hearings = with_transcripts(hearings, read(hearings, "audio", model), model)
    for mode in ("audio", "text", "both"):
        asked = [task for task in tasks if mode_of(task) == mode and not _is_transcript(task, model)]
        if asked:
            prefix = read(hearings, mode, model)
            closed = closed_answers([task for task in asked if task.is_closed], hearings, prefix, model)
            answers |= {name: list(rows) for name, rows in closed.items()}
            answers |= {t.name: open_answers(t, hearings, prefix, model) for t in asked if not t.is_closed}
    for task in tasks:
        if _is_transcript(task, model):
            answers[task.name] = [transcript_answer(hearing, model) for hearing in hearings]
    return answers


def check(tasks: Sequence[Task], model: Model) -> None:
    """Raises TaskError, with a line for each, where the LLM could not hold a task's longest question and answer, or a
    grammar cannot be followed."""
    room = model.llm.max_positions - MAX_PREFIX_TOKENS
    problems = []
    for task in tasks:
        try:
            guides_of(task, model, count=1)
        except TaskError as error:
            problems.append(f"{task.path}: task {task.name}: {error}; make its limits or properties simpler")
        question = max(len(prompts.question_ids(model.tokenizer, question)) for question in task.questions())
        labels = max((len(prompts.answer_ids(model.tokenizer, answer)) for answer in task.scored), default=0)
        needed = question + (labels if task.is_closed else task.max_tokens or MAX_TOKENS)
        if needed > room:
            problems.append(
                f"{task.path}: task {task.name}: its question and answer take up to {needed} tokens, and the LLM holds "
                f"{room} beside 30 s of speech; shorten the instruction, the labels or max_tokens"
            )
    if problems:
        raise TaskError("\n".join(problems))


def mode_of(task: Task) -> Mode:
    """What the LLM is given for a task."""
    heard = set(task.hears)
    if heard == {"audio"}:
        return "audio"
    return "text" if heard == {"transcript"} else "both"


def read(hearings: Sequence[Hearing], mode: Mode, model: Model) -> Prefix:
    """The shared prefix: [opening][speech embeddings][transcript], the parts that `mode` has."""
    opening = model.llm.embed(torch.tensor(prompts.opening_ids(model.tokenizer)))
    inputs: list[Tensor] = []
    for hearing in hearings:
        parts = [opening]
        if mode != "text":
            parts.append(hearing.speech.to(opening))
        if mode != "audio":
            parts.append(model.llm.embed(torch.tensor(prompts.transcript_ids(model.tokenizer, hearing.text))))
        inputs.append(torch.cat(parts))
    with part("prefill"):
        return prefill(model.llm, inputs)


def _is_transcript(task: Task, model: Model) -> bool:
    """Whether the transcript that stands in the prefix is the answer."""
    is_asr = task.is_library and task.definition == "asr"
    return is_asr and (task.values["via"] == "recogniser" or model.recogniser is None)
