from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from svbatch.ask import ask, read
from svbatch.bundle import Calibration
from svbatch.habit import UNFITTED, habit
from svbatch.hear import Hearing, Span, hear
from svbatch.language.scoring import score_labels
from svbatch.model import Model
from svbatch.tasks import prompts
from svbatch.tasks.task import Task, load_task


@pytest.fixture(scope="module")
def hearings(bursts, tiny_model) -> list[Hearing]:
    with torch.inference_mode():
        return hear([Span(bursts(seconds, seed=7), 0.0, transcribed=True) for seconds in (1.0, 2.5)], tiny_model)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture
def task() -> Task:
    return load_task({"intent": {"labels": [{"name": n, "description": f"the {n}"} for n in ("rain", "sun")]}}, Path())


def log_probs(task: Task, hearings: list[Hearing], model: Model) -> np.ndarray:
    answers = ask([task], hearings, model)[task.name]
    return np.log([[entry["probability"] for entry in answer["probabilities"]] for answer in answers])


def scores(task: Task, hearings: list[Hearing], model: Model) -> np.ndarray:
    labels = [prompts.answer_ids(model.tokenizer, label) for label in task.scored]
    question = prompts.question_ids(model.tokenizer, task.questions()[0])
    return score_labels(model.llm, read(hearings, "both", model), question, labels).double().numpy()


def nothing(hearings: list[Hearing]) -> Hearing:
    assert hearings[0].transcript is not None
    return replace(hearings[0], speech=hearings[0].speech[:0], transcript=replace(hearings[0].transcript, text=""))


def softmax_log(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def test_the_habit_is_what_a_hearing_of_nothing_scores(task, hearings, tiny_model):
    assert habit(task, tiny_model) == pytest.approx(scores(task, [nothing(hearings)], tiny_model)[0], abs=1e-4)


def test_labels_that_nothing_was_fitted_for_lose_a_quarter_of_their_habit_and_are_told_less_surely(
    task, hearings, tiny_model
):
    expected = (scores(task, hearings, tiny_model) - 0.25 * habit(task, tiny_model)) / 2.0
    assert (UNFITTED.habit, UNFITTED.temperature) == (0.25, 2.0)
    assert log_probs(task, hearings, tiny_model) == pytest.approx(softmax_log(expected), abs=1e-4)
    assert not any(answer["calibrated"] for answer in ask([task], hearings, tiny_model)[task.name])


def test_a_fitted_task_loses_the_share_that_was_fitted(task, hearings, tiny_model):
    fitted = Calibration(temperature=2.0, habit=1.0, labels=list(task.label_names))
    model = replace(tiny_model, calibration={"intent": fitted})
    expected = (scores(task, hearings, model) - habit(task, model)) / 2.0
    assert log_probs(task, hearings, model) == pytest.approx(softmax_log(expected), abs=1e-4)


def test_a_habit_is_asked_once_for_each_question(task, hearings, tiny_model):
    model = replace(tiny_model, habits={})
    ask([task], hearings, model)
    first = habit(task, model)
    ask([task], hearings[:1], model)
    assert habit(task, model) is first
    assert list(model.habits) == [(task.questions()[0], ("rain", "sun"), True)]
    worded = task.model_copy(update={"instructions": ("Rain or sun?",)})
    ask([worded], hearings, model)
    assert len(model.habits) == 2
