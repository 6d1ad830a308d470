"""Tests from texts written by hand, spoken by voices that nothing is trained on.

written.yaml has those of the library's tasks, unseen/ two tasks and a set of labels that nothing is trained on either.
"""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from svbatch.training.benchmark import Benchmark, Item
from svbatch.training.synthesise import PITCHES, RATES
from svbatch.training.voices import ESPEAK_LICENCE, Voice, missing_packages, speak

SOURCE = "written"
TEXTS = Path(__file__).with_name("written.yaml")
UNSEEN = Path(__file__).with_name("unseen")
ACCENTS = {"en-us": "american", "en": "british"}
VARIANTS = (
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Gene", "Jacky", "Lee", "Mario"),
    *("Michael", "Mike", "belinda", "benjamin", "john", "linda", "quincy", "steph", "victor", "zac"),
)
"""espeak-ng's voices by other hands than those that svbatch.training.voices trains on."""


def can_speak() -> bool:
    """Whether espeak-ng is installed."""
    return not missing_packages([_voice("en", VARIANTS[0])])


def written_benchmarks() -> Iterator[Benchmark]:
    """sentiment, accent_written, intent, translation, keywords and slots_written; and the unseen ones."""
    texts = yaml.safe_load(TEXTS.read_text(encoding="utf-8"))
    for task in ("sentiment", "intent"):
        labelled = [(text, label) for label, lines in texts[task].items() for text in lines]
        yield Benchmark(task, task, "synthetic", tuple(_item(text, label) for text, label in labelled))
    spoken = [text for lines in texts["sentiment"].values() for text in lines]
    accents = tuple(_item(text, ACCENTS[_drawn(text)[0]]) for text in spoken)
    yield Benchmark("accent_written", "accent", "synthetic", accents)
    messages = texts["messages"]
    german = {"translation": {"language": "German"}}
    yield Benchmark("translation", german, "synthetic", tuple(_item(m["text"], m["german"]) for m in messages))
    yield Benchmark("keywords", "keywords", "synthetic", tuple(_item(m["text"], m["keywords"]) for m in messages))
    slots = tuple(_item(m["text"], list(m["slots"].items())) for m in messages)
    yield Benchmark("slots_written", "slots", "synthetic", slots)
    yield from _unseen()


def _unseen() -> Iterator[Benchmark]:
    """unseen_intent, unseen_topic and unseen_sentence_type."""
    texts = yaml.safe_load((UNSEEN / "texts.yaml").read_text(encoding="utf-8"))
    wishes = [_item(text, label) for label, lines in texts["household"].items() for text in lines]
    yield Benchmark("unseen_intent", {"intent": {"labels": texts["intents"]}}, "synthetic", tuple(wishes))
    spoken = [
        (text, {"topic": topic, "sentence_type": kind})
        for topic, kinds in texts["sentences"].items()
        for kind, lines in kinds.items()
        for text in lines
    ]
    for task in ("topic", "sentence_type"):
        items = tuple(_item(text, answers[task]) for text, answers in spoken)
        yield Benchmark(f"unseen_{task}", str(UNSEEN / f"{task}.yaml"), "synthetic", items)


def _item(text: str, truth: Any) -> Item:
    accent, variant, rate, pitch = _drawn(text)
    return Item(text, variant, SOURCE, truth, partial(_spoken, text, _voice(accent, variant), rate, pitch))


def _drawn(text: str) -> tuple[str, str, float, int]:
    """Accent, variant, rate and pitch of the one voice that says the text, drawn by the text alone."""
    dice = random.Random(text)
    return dice.choice(list(ACCENTS)), dice.choice(VARIANTS), dice.uniform(*RATES), dice.randint(*PITCHES)


def _spoken(text: str, voice: Voice, rate: float, pitch: int) -> NDArray[np.float32]:
    return speak(text, voice, rate=rate, pitch=pitch)[0]


def _voice(accent: str, variant: str) -> Voice:
    return Voice("espeak-ng", f"{accent}+{variant}", "female", "espeak-ng", ESPEAK_LICENCE)
