"""Questions about training clips with known answers, composed on the fly and drawn by step and seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from svbatch.ask import mode_of
from svbatch.errors import TrainingError
from svbatch.speech.readout import spoken_form
from svbatch.tasks.prompts import render
from svbatch.tasks.task import Task, bare_task, load_task
from svbatch.training.data import Example
from svbatch.training.frames import Heard, Layout, Listener, LiveClip
from svbatch.training.known import learnable_answers
from svbatch.training.recipe import LanguageStage, Mode

NUM_NEIGHBOURS = 60  # clips of similar length from which a batch is drawn
LOOKALIKES = 12
MIXED = ("speaker_count",)
COMPOSED = ("asr", "keyword_search", "speech_activity", *MIXED)
"""Tasks whose questions are made of texts, silence and voices; those of the others come from labels."""

FEWER_LABELS_SHARE = 0.3
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

    clip: Heard
    mode: Mode
    transcript: str | None
    pairs: tuple[Pair, ...]
    said: str | None  # the clip's words in spoken form, for CTC; "" if nobody speaks, None if it is not known


class Questioner:
    """Draws the questions of a batch. `transcripts` are the recogniser's, by index of example; `listener` hears two
    speakers at once, which are composed."""

    def __init__(
        self,
        examples: Sequence[Example],
        clips: Sequence[Heard],
        transcripts: Mapping[int, str],
        stage: LanguageStage,
        listener: Listener | None = None,
    ) -> None:
        self._examples = examples
        self._transcripts = transcripts
        self._stage = stage
        self._listener = listener
        texts = {i: spoken_form(e.text) for i, e in enumerate(examples) if e.text and e.lang == "en"}
        self._said = {i: text for i, text in texts.items() if text}
        self._said |= {i: "" for i, e in enumerate(examples) if e.is_silent}
        by_length = sorted(clips, key=lambda clip: clip.length)
        self._spoken = [c for c in by_length if self._said.get(c.example)]
        self._transcribed = [c for c in self._spoken if c.example in transcripts]
        self._quiet = [c for c in by_length if examples[c.example].is_silent]
        self._known = {name: learnable_answers(name, examples) for name in stage.questions if name not in COMPOSED}
        askable = [c for c in by_length if not self._is_cascade or c.example in transcripts]
        self._led = {name: self._by_answer(name, askable) for name in self._known}
        if "speaker_count" in stage.questions:
            self._solo = [c for c in by_length if examples[c.example].speaker and not examples[c.example].is_silent]
        self._refuse_what_nothing_answers()
        self._words = sorted({w for text in self._said.values() for w in text.split() if len(w) > 2})
        self._alike: dict[str, list[str]] = {}

    @property
    def _is_cascade(self) -> bool:
        """Whether nothing is heard: every question is asked of a transcript alone."""
        return set(self._stage.modes) == {"text"}

    def _by_answer(self, name: str, clips: Sequence[Heard]) -> dict[str, list[Heard]]:
        """Clips that a task is known of: of a closed one by their answer, so that each is drawn as often."""
        pools: dict[str, list[Heard]] = {}
        for clip in clips:
            for known in self._known[name].get(clip.example, ())[:1]:
                pools.setdefault(known.answer if known.task.is_closed else "", []).append(clip)
        return pools

    def _refuse_what_nothing_answers(self) -> None:
        asked, modes = self._stage.questions.keys(), self._stage.modes.keys()
        if asked & {"asr", "keyword_search"} and not self._spoken:
            raise TrainingError("no example has `text` and `lang: en`; add some")
        if modes - {"audio"} and not self._transcribed:
            raise TrainingError("modes text and both want transcripts; set the recipe's `transcripts` above 0")
        deaf = [name for name in asked if self._is_cascade and mode_of(bare_task(name, Path())) == "audio"]
        if deaf:
            raise TrainingError(f"{', '.join(deaf)} cannot be told from a transcript; leave out, or give other modes")
        if "speech_activity" in asked and not (self._quiet and self._spoken):
            raise TrainingError("speech_activity wants examples with `speech: false` too; add some")
        if "speaker_count" in asked and len({self._examples[c.example].speaker for c in self._solo}) < 2:
            raise TrainingError("speaker_count wants examples of two `speaker`s, to be mixed; add some")
        if unknown := [name for name, pools in self._led.items() if not pools]:
            raise TrainingError(f"no example has an answer to {', '.join(unknown)}; add its label, or leave it out")

    def draw(self, batch: int, seed: int) -> list[Question]:
        """The questions of one batch, of clips similar in length, up to the stage's positions."""
        random = np.random.default_rng([seed, batch])
        quantile = random.random()
        questions: list[Question] = []
        used = 0.0
        while used < self._stage.tokens_per_batch:
            question = self._one(quantile, random)
            if not question.pairs:
                continue
            questions.append(question)
            used += 10 + question.clip.length * 0.1 + len(question.transcript or "") / 4
            used += sum(10 + (len(pair.instruction) + len(pair.answer)) / 4 for pair in question.pairs)
        return questions

    def _one(self, quantile: float, random: np.random.Generator) -> Question:
        if "speech_activity" in self._stage.questions and random.random() < QUIET_SHARE:
            clip = self._near(self._quiet, quantile, random)
            return Question(clip, "audio", None, (_activity("no_speech", random),), "")
        lead = self._lead(random)
        if lead == "speaker_count":
            return self._counted(quantile, random)
        if lead is not None:
            return self._led_by(lead, quantile, random)
        mode = _choice(self._stage.modes, random)
        clip = self._near(self._spoken if mode == "audio" else self._transcribed, quantile, random)
        return self._asked(clip, mode, None, random)

    def _lead(self, random: np.random.Generator) -> str | None:
        """The task that chooses the hearing: none for those that any English text answers."""
        weights = {name: self._stage.questions[name] for name in (*self._led, *MIXED) if name in self._stage.questions}
        if not weights:
            return None
        rest = {"": 1.0} if self._stage.questions.keys() & {"asr", "keyword_search", "speech_activity"} else {}
        return _choice(weights | rest, random) or None

    def _led_by(self, lead: str, quantile: float, random: np.random.Generator) -> Question:
        pools = self._led[lead]
        clip = self._near(pools[sorted(pools)[int(random.integers(len(pools)))]], quantile, random)
        known = self._known[lead][clip.example][0]
        is_sound = mode_of(known.task) == "audio" or clip.example not in self._transcripts
        mode: Mode = "audio" if is_sound else _choice(self._stage.modes, random)
        return self._asked(clip, mode, lead, random)

    def _asked(self, clip: Heard, mode: Mode, lead: str | None, random: np.random.Generator) -> Question:
        """A hearing with its questions: the lead's once, and each other task as often as the recipe says."""
        said = self._said.get(clip.example)
        pairs: list[Pair] = []
        for task, number in self._stage.questions.items():
            for _ in range(1 if task == lead else int(number + random.random())):
                pairs += self._pair(task, clip, mode, said, random)
        transcript = None if mode == "audio" else self._transcripts[clip.example]
        return Question(clip, mode, transcript, tuple(pairs), said)

    def _pair(
        self, name: str, clip: Heard, mode: Mode, said: str | None, random: np.random.Generator
    ) -> Iterator[Pair]:
        """One question of a task, if its answer is known of the clip, and the mode is one that a run asks it in."""
        if name == "asr" and said:
            yield Pair(_wording(_LOADED[name], said, random), said, is_closed=False)
        elif name == "keyword_search" and said:
            word, is_said = self._keyword(said, random)
            yield Pair(_keyword_wording(word, random), "yes" if is_said else "no", is_closed=True)
        elif name == "speech_activity" and said and mode == "audio":
            yield _activity("speech", random)
        elif known := self._known.get(name, {}).get(clip.example):
            one = known[int(random.integers(len(known)))]
            if mode == "audio" or mode_of(one.task) != "audio":
                yield Pair(_wording(one.task, one.answer, random), one.answer, one.task.is_closed)

    def _counted(self, quantile: float, random: np.random.Generator) -> Question:
        """One speaker, mostly in two clips, one after the other; or two of one source if it can be, that are composed:
        one after the other, or both at once."""
        clip = self._near(self._solo, quantile, random)
        own = self._examples[clip.example]
        said = self._said.get(clip.example)
        if self._listener is None:
            return Question(clip, "audio", None, (_count("one", random),), said)
        is_one = bool(random.random() < 0.5)
        same = [c for c in self._solo if self._examples[c.example].source == own.source]
        fits = [c for c in same if (self._examples[c.example].speaker == own.speaker) == is_one and c is not clip]
        if is_one and (not fits or random.random() < 0.3):
            return Question(clip, "audio", None, (_count("one", random),), said)
        fits = fits or [c for c in self._solo if self._examples[c.example].speaker != own.speaker]
        other = fits[int(random.integers(len(fits)))]
        layout: Layout = "joined" if is_one or random.random() < 0.5 else "mixed"
        length = clip.length + other.length if layout == "joined" else max(clip.length, other.length)
        both = LiveClip(clip.example, length, self._listener, (other.example, layout))
        return Question(both, "audio", None, (_count("one" if is_one else "two", random),), None)

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

    def _near(self, pool: Sequence[Heard], quantile: float, random: np.random.Generator) -> Heard:
        """A clip of about a length, by the weights of the corpora."""
        middle = int(quantile * len(pool))
        low = max(0, min(middle - NUM_NEIGHBOURS // 2, len(pool) - NUM_NEIGHBOURS))
        near = pool[low : low + NUM_NEIGHBOURS]
        if not self._stage.corpora:
            return near[int(random.integers(len(near)))]
        weights = np.array([self._stage.corpora.get(self._examples[c.example].source, 1.0) for c in near])
        shares = weights / weights.sum() if weights.any() else None
        return near[int(random.choice(len(near), p=shares))]


def _activity(label: str, random: np.random.Generator) -> Pair:
    return Pair(_wording(_LOADED["speech_activity"], label, random), label, is_closed=True)


def _count(label: str, random: np.random.Generator) -> Pair:
    return Pair(_wording(_LOADED["speaker_count"], label, random), label, is_closed=True)


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


def _wording(task: Task, answer: str, random: np.random.Generator) -> str:
    asked = _reordered(task, answer, random)
    return asked.questions(asked.instructions[random.integers(len(asked.instructions))])[0]


def _reordered(task: Task, answer: str, random: np.random.Generator) -> Task:
    """The task with its labels in another order, so that none is learnt by its place; where one of them is the answer,
    often with fewer, so that what is listed is read. Names that a wording spells out stay where they are."""
    if not task.labels:
        return task
    labels = [task.labels[i] for i in random.permutation(len(task.labels))]
    if task.answer == "label" and random.random() < FEWER_LABELS_SHARE:
        num_others = int(random.integers(1, len(labels)))
        others = [label for label in labels if label.name != answer][:num_others]
        labels = [label for label in labels if label.name == answer or label in others]
    return task.model_copy(update={"labels": tuple(labels)})


def _choice(weights: Mapping[Name, float], random: np.random.Generator) -> Name:
    names = list(weights)
    shares = np.array([weights[name] for name in names])
    return names[int(random.choice(len(names), p=shares / shares.sum()))]


_LOADED = {
    "asr": load_task("asr", Path()),
    "keyword_search": load_task({"keyword_search": {"keywords": ["word"]}}, Path()),
    "speech_activity": load_task("speech_activity", Path()),
    "speaker_count": load_task("speaker_count", Path()),
}
