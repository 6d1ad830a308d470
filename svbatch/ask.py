"""Questions about spans that were heard: what was heard is read by the LLM once, every question goes on from there."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch

from svbatch.errors import TaskError
from svbatch.generate import (
    MAX_TOKENS,
    Unanswered,
    guides_of,
    is_transcript,
    open_answers,
    transcript_answer,
    with_transcripts,
)
from svbatch.hear import Hearing
from svbatch.job import Job
from svbatch.language.llm import Prefix
from svbatch.memory import questions_of, room_for
from svbatch.model import Model
from svbatch.score import closed_answers
from svbatch.tasks import prompts
from svbatch.tasks.answers import Answer
from svbatch.tasks.grammar import spelled
from svbatch.tasks.task import Task
from svbatch.timing import part
from svbatch.yaml_file import shown

Mode = Literal["audio", "text", "both"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_PREFIX_TOKENS = 800  # 30 s of speech are at most 375 embeddings, a transcript 400 tokens


def ask(
    tasks: Sequence[Task], hearings: Sequence[Hearing], model: Model, about: Mapping[str, Sequence[int]] | None = None
) -> dict[str, list[Answer | Unanswered]]:
    """Each task's answers by its name: to the hearings that it is `about` (their places, ascending), else to all."""
    about = about or {task.name: range(len(hearings)) for task in tasks}
    answers: dict[str, list[Answer | Unanswered]] = {task.name: [] for task in tasks}
    tasks = [task for task in tasks if about[task.name]]
    written = [task for task in tasks if mode_of(task) != "audio"] if model.recogniser is None else []
    asked = {mode: [t for t in tasks if mode_of(t) == mode and not is_transcript(t, model)] for mode in MODES}
    if asked["audio"] or asked["both"] or written:
        rows = _rows([*asked["audio"], *asked["both"], *written], about)
        prefix = read([hearings[row] for row in rows], "audio", model, room=_room(asked, hearings, model))
        hearings = _written(_rows(written, about), rows, hearings, prefix, model)
        answers |= _answered(asked["audio"], rows, hearings, prefix, model, about)
        if asked["both"]:
            told_rows = _rows(asked["both"], about)
            prefix = _selected(prefix, rows, told_rows)
            prefix = _told(prefix, [hearings[row] for row in told_rows], model)
            answers |= _answered(asked["both"], told_rows, hearings, prefix, model, about)
    if asked["text"]:
        rows = _rows(asked["text"], about)
        prefix = read([hearings[row] for row in rows], "text", model)
        answers |= _answered(asked["text"], rows, hearings, prefix, model, about)
    for task in tasks:
        if is_transcript(task, model):
            answers[task.name] = [transcript_answer(hearings[row], model) for row in about[task.name]]
    return answers


def _answered(
    tasks: Sequence[Task],
    rows: Sequence[int],
    hearings: Sequence[Hearing],
    prefix: Prefix,
    model: Model,
    about: Mapping[str, Sequence[int]],
) -> dict[str, list[Answer | Unanswered]]:
    """Answers of tasks that share a prefix, which has read the hearings at `rows`; those about the same hearings are
    asked together."""
    answers: dict[str, list[Answer | Unanswered]] = {}
    groups: dict[tuple[int, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(tuple(about[task.name]), []).append(task)
    for own, alike in groups.items():
        some = _selected(prefix, rows, own)
        heard = [hearings[row] for row in own]
        closed = closed_answers([task for task in alike if task.is_closed], heard, some, model)
        answers |= {name: list(found) for name, found in closed.items()}
        answers |= open_answers([task for task in alike if not task.is_closed], heard, some, model)
    return answers


def _rows(tasks: Sequence[Task], about: Mapping[str, Sequence[int]]) -> list[int]:
    """The hearings that any of the tasks is about."""
    return sorted({row for task in tasks for row in about[task.name]})


def _selected(prefix: Prefix, rows: Sequence[int], wanted: Sequence[int]) -> Prefix:
    """The prefix of the hearings at `wanted`, some of the `rows` that it has read."""
    if list(rows) == list(wanted):
        return prefix
    place = {row: i for i, row in enumerate(rows)}
    return prefix.select(torch.tensor([place[row] for row in wanted]))


def _written(
    wanted: Sequence[int], rows: Sequence[int], hearings: Sequence[Hearing], prefix: Prefix, model: Model
) -> Sequence[Hearing]:
    """The hearings at `wanted`, some of the `rows` that the prefix has read, with a transcript by the LLM, the others
    as they are."""
    if not wanted:
        return hearings
    some = with_transcripts([hearings[row] for row in wanted], _selected(prefix, rows, wanted), model)
    told = dict(zip(wanted, some, strict=True))
    return [told.get(row, hearing) for row, hearing in enumerate(hearings)]


def check(job: Job, model: Model) -> None:
    """Raises TaskError, with a line for each, where the LLM could not hold a task's longest question and answer, cannot
    spell its answers, or a grammar cannot be followed."""
    problems = []
    for task in job.tasks:
        where = f"{job.path}: tasks: {task.name}" if task.is_library else f"{task.path}: task {task.name}"
        problems += [f"{where}: {problem}" for problem in _problems(task, model)]
    if problems:
        raise TaskError("\n".join(problems))


def _problems(task: Task, model: Model) -> Iterator[str]:
    try:
        guides_of(task, model, count=1)
    except TaskError as error:
        yield f"{error}; make its limits or properties simpler"
    if not prompts.can_write(model.tokenizer, spelled(task)):
        yield (
            f"its answers are spelled {shown(spelled(task))}, for which the LLM has not all the tokens; take other "
            "labels, another answer type or another bundle"
        )
    room = model.llm.max_positions - MAX_PREFIX_TOKENS
    question = max(len(prompts.question_ids(model.tokenizer, question)) for question in task.questions())
    labels = max((len(prompts.answer_ids(model.tokenizer, answer)) for answer in task.scored), default=0)
    answer = labels if task.is_closed else task.max_tokens or MAX_TOKENS
    if question + answer > room:
        given = [parameter.name for parameter in task.parameters if parameter.type != "choice"]
        own = ["labels" if task.is_closed else "max_tokens"] if answer > question else ["instructions"]
        yield (
            f"its question and answer take up to {question + answer} tokens, and the LLM holds {room} beside 30 s of "
            f"speech; shorten {' or '.join(f'`{key}`' for key in (given if task.is_library and given else own))}"
        )


def mode_of(task: Task) -> Mode:
    """What the LLM is given for a task."""
    heard = set(task.hears)
    if heard == {"audio"}:
        return "audio"
    return "text" if heard == {"transcript"} else "both"


def _room(asked: Mapping[Mode, Sequence[Task]], hearings: Sequence[Hearing], model: Model) -> int:
    """Positions that come after the sound at most."""
    tasks = [*asked["audio"], *asked["both"]]
    text = max(map(len, _transcripts(hearings, model))) if asked["both"] else 0
    return text + room_for(questions_of(tasks, model), len(hearings))


def read(hearings: Sequence[Hearing], mode: Mode, model: Model, *, room: int = 0) -> Prefix:
    """The shared prefix: [opening][speech embeddings][transcript], the parts that `mode` has. `room`: for positions
    that will follow."""
    opening = model.llm.embed(torch.tensor(prompts.opening_ids(model.tokenizer), dtype=torch.int64))
    with part("prefill"):
        if mode == "text":
            told = [model.llm.embed(torch.tensor(ids)) for ids in _transcripts(hearings, model)]
            return model.llm.read([torch.cat([opening, each]) for each in told])
        sounds = [torch.cat([opening, hearing.speech.to(opening)]) for hearing in hearings]
        prefix = model.llm.read(sounds, room=room)
    return _told(prefix, hearings, model) if mode == "both" else prefix


def _told(prefix: Prefix, hearings: Sequence[Hearing], model: Model) -> Prefix:
    """What was read of the sound, with the transcripts; the sound alone may not be asked about any more."""
    with part("prefill"):
        return model.llm.read_on(prefix, _transcripts(hearings, model))


def _transcripts(hearings: Sequence[Hearing], model: Model) -> list[list[int]]:
    return [prompts.transcript_ids(model.tokenizer, hearing.text) for hearing in hearings]
