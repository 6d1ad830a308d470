"""Questions about training clips with known answers, composed on the fly and drawn by step and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from svbatch.errors import TrainingError
from svbatch.speech.readout import spoken_form
from svbatch.tasks.prompts import render
from svbatch.tasks.task import Task, load_task
from svbatch.training.data import Example
from svbatch.training.frames import Clip
from svbatch.training.recipe import LanguageStage, Mode

NUM_NEIGHBOURS = 60  # clips of similar length from which a batch is drawn
LOOKALIKES = 12
QUIET_SHARE = 0.1  # of hearings without speech, where speech_activity is asked
Name = TypeVar("Name", bound=str)


class Pair(NamedTuple):
    """One question of a hearing. A closed answer is one of a set of labels; its loss is kept apart from texts'."""

    instruction: str
    answer: str
    is_closed: bool


@dataclass(frozen=True)
class Question:
    """What is asked of one clip: pairs of instruction and answer, each asked of the same hearing and none seeing
    another. `transcript` is None in mode audio; in mode text the clip is not heard."""

    clip: Clip
    mode: Mode
    transcript: str | None
    pairs: tuple[Pair, ...]
    said: str  # the clip's words in spoken form, for CTC; "" if nobody speaks


class Questioner:
    """Draws the questions of a step. `transcripts` are the recogniser's, by index of example."""

    def __init__(
        self,
        examples: Sequence[Example],
        clips: Sequence[Clip],
        transcripts: Mapping[int, str],
        stage: LanguageStage,
    ) -> None:
        self._examples = examples
        self._transcripts = transcripts
        self._stage = stage
        texts = {i: spoken_form(e.text) for i, e in enumerate(examples) if e.text and e.lang == "en"}
        self._said = {i: text for i, text in texts.items() if text}
        silent = {i for i, e in enumerate(examples) if e.labels.get("speech") is False}
        by_length = sorted(clips, key=lambda clip: clip.length)
        self._spoken = [c for c in by_length if c.example in self._said]
        self._transcribed = [c for c in self._spoken if c.example in transcripts]
        self._quiet = [c for c in by_length if c.example in silent]
        self._refuse_what_nothing_answers()
        self._words = sorted({w for text in self._said.values() for w in text.split() if len(w) > 2})
        self._alike: dict[str, list[str]] = {}

    def _refuse_what_nothing_answers(self) -> None:
        asked, modes = self._stage.questions.keys(), self._stage.modes.keys()
        if not self._spoken:
            raise TrainingError("no example has `text` and `lang: en`; add some")
        if modes - {"audio"} and not self._transcribed:
            raise TrainingError("modes text and both want transcripts; set the recipe's `transcripts` above 0")
        if "speech_activity" in asked and not self._quiet:
            raise TrainingError("speech_activity wants examples with `speech: false` too; add some")

    def draw(self, step: int, seed: int) -> list[Question]:
        """The questions of one step, of clips similar in length, up to the stage's positions."""
        random = np.random.default_rng([seed, step])
        quantile = random.random()
        questions: list[Question] = []
        used = 0.0
        while used < self._stage.tokens_per_batch:
            question = self._one(quantile, random)
            if not question.pairs:
                continue
            questions.append(question)
            used += 10 + question.clip.length * 0.1 + len(question.transcript or "") / 4
            used += sum(20 + len(pair.answer) / 4 for pair in question.pairs)
        return questions

    def _one(self, quantile: float, random: np.random.Generator) -> Question:
        if "speech_activity" in self._stage.questions and random.random() < QUIET_SHARE:
            clip = _near(self._quiet, quantile, random)
            return Question(clip, "audio", None, (_activity("no_speech", random),), "")
        mode = _choice(self._stage.modes, random)
        clip = _near(self._spoken if mode == "audio" else self._transcribed, quantile, random)
        said = self._said[clip.example]
        pairs: list[Pair] = []
        for task, number in self._stage.questions.items():
            for _ in range(int(number + random.random())):
                if task == "asr":
                    pairs.append(Pair(_wording(_LOADED[task], random), said, is_closed=False))
                elif task == "keyword_search":
                    word, is_said = self._keyword(said, random)
                    pairs.append(Pair(_keyword_wording(word, random), "yes" if is_said else "no", is_closed=True))
                elif mode == "audio":
                    pairs.append(_activity("speech", random))
        return Question(clip, mode, None if mode == "audio" else self._transcripts[clip.example], tuple(pairs), said)

    def _keyword(self, said: str, random: np.random.Generator) -> tuple[str, bool]:
        """A word and whether it is said: half are; of the others half look like one that is."""
        words = [word for word in said.split() if len(word) > 2] or said.split()
        present = str(random.choice(words))
        if random.random() < 0.5:
            return present, True
        if random.random() < 0.5:
            if present not in self._alike:
                self._alike[present] = lookalikes(present, self._words)
            if alike := [w for w in self._alike[present] if w not in words]:
                return str(random.choice(alike)), False
        other = str(random.choice(self._words))
        return other, other in said.split()


def _activity(label: str, random: np.random.Generator) -> Pair:
    return Pair(_wording(_LOADED["speech_activity"], random), label, is_closed=True)


def lookalikes(word: str, vocabulary: Sequence[str]) -> list[str]:
    """Words of `vocabulary` that share most letter pairs with `word` (Dice coefficient), without itself."""
    pairs = _pairs(word)
    scored = sorted((-2 * len(pairs & _pairs(w)) / (len(pairs) + len(_pairs(w))), w) for w in vocabulary if w != word)
    return [w for score, w in scored[:LOOKALIKES] if score < -0.3]


@cache
def _pairs(word: str) -> frozenset[str]:
    marked = f"<{word}>"
    return frozenset(a + b for a, b in pairwise(marked))


def _keyword_wording(word: str, random: np.random.Generator) -> str:
    task = _LOADED["keyword_search"]
    return render(task.instructions[random.integers(len(task.instructions))], {"keyword": word})


def _wording(task: Task, random: np.random.Generator) -> str:
    return task.questions(task.instructions[random.integers(len(task.instructions))])[0]


def _near(pool: Sequence[Clip], quantile: float, random: np.random.Generator) -> Clip:
    middle = int(quantile * len(pool))
    low = max(0, min(middle - NUM_NEIGHBOURS // 2, len(pool) - NUM_NEIGHBOURS))
    return pool[int(random.integers(low, min(len(pool), low + NUM_NEIGHBOURS)))]


def _choice(weights: Mapping[Name, float], random: np.random.Generator) -> Name:
    names = list(weights)
    shares = np.array([weights[name] for name in names])
    return names[int(random.choice(len(names), p=shares / shares.sum()))]


_LOADED = {
    "asr": load_task("asr", Path()),
    "keyword_search": load_task({"keyword_search": {"keywords": ["word"]}}, Path()),
    "speech_activity": load_task("speech_activity", Path()),
}
