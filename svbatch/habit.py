"""What the LLM says of a question's labels when it has heard nothing: its habit, whatever is said.

A label that it likes by habit is answered too often where it does not know. A share of the habit is taken off (after
Zhao et al., Calibrate Before Use, ICML 2021): one that was fitted for the task, or UNFITTED's.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from svbatch.bundle import Calibration
from svbatch.language.scoring import score_labels
from svbatch.model import Model
from svbatch.tasks import prompts
from svbatch.tasks.task import Task

UNFITTED = Calibration(temperature=2.0, habit=0.25)
"""For labels that nothing was fitted for; yes and no then lose no habit, and have a temperature of 1. Chosen on
tasks that the LLM of `mini` was never taught (docs/tries.md)."""

Scores = NDArray[np.float32]


def habit(task: Task, model: Model) -> Scores:
    """Log-probabilities (N,) of a task's labels after its question, where nothing was heard: no sound, and an empty
    transcript if the task reads one. Asked once, and alone, so that no batch changes it."""
    [question] = task.questions()
    key = (question, task.scored, "transcript" in task.hears)
    if key not in model.habits:
        model.habits[key] = _asked_of_nothing(*key, model)
    return model.habits[key]


def _asked_of_nothing(question: str, labels: Sequence[str], is_told: bool, model: Model) -> Scores:
    prefix = model.llm.read([model.llm.embed(torch.tensor(prompts.opening_ids(model.tokenizer), dtype=torch.int64))])
    if is_told:
        prefix = model.llm.read_on(prefix, [prompts.transcript_ids(model.tokenizer, "")])
    ids = [prompts.answer_ids(model.tokenizer, label) for label in labels]
    scores: Scores = score_labels(model.llm, prefix, prompts.question_ids(model.tokenizer, question), ids)[0].numpy()
    return scores
