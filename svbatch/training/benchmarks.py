"""The tests that a manifest allows, and the table of them.

An example is a test of a task that has a label under the task's name (`emotion`, `gender`, `slots` …), of `asr` and
keyword_search where it is English with a text, and of speech_activity where it says whether anyone speaks. Recordings
of several speakers and without speech are composed; sentiment, intent, translation and keywords are written by hand
and spoken by a synthesiser. Everything follows from the manifest and the seed.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from svbatch.tasks.task import load_task
from svbatch.training.benchmark import Benchmark, Item
from svbatch.training.data import Example, read_waveform
from svbatch.training.known import label_of
from svbatch.training.mixtures import NO_SPEECH, joined, without_speech
from svbatch.training.normaliser import normalised
from svbatch.training.questions import lookalikes
from svbatch.training.written import can_speak, written_benchmarks

log = logging.getLogger(__name__)
LABELLED = ("emotion", "sentiment", "accent", "gender", "language", "intent")
MIXED = 120
"""Recordings of several speakers that are composed."""
SYNTHESISED = "synthesised"  # the source that svbatch.training.synthesise gives


def benchmarks(examples: Sequence[Example], *, seed: int, written: bool = True) -> list[Benchmark]:
    """Every test that `examples` allow, and those written by hand if `written`; each has at least one item, a test of
    labels two labels."""
    found = [
        _benchmark("asr", "asr", [_item(e, e.text) for e in _english(examples)]),
        _benchmark("keyword_search", "keyword_search", _keyword_search(examples, seed)),
        _benchmark("speech_activity", "speech_activity", _speech_activity(examples, seed)),
        _benchmark("speaker_count", "speaker_count", speaker_counts(examples, seed)),
        *(_benchmark(task, task, _labelled(task, examples)) for task in LABELLED),
        *_slots(examples),
    ]
    tests = [test for test in found if test.items]
    if written and not can_speak():
        log.warning("espeak-ng is not installed: the tests that are written by hand are left out")
    elif written:
        names = {test.name for test in tests}
        tests += [test for test in written_benchmarks() if test.name not in names]
    return tests


def table(tests: Sequence[Benchmark]) -> list[dict[str, Any]]:
    """A row for each test: what it is of, how large it is, and what confounds it."""
    return [
        {
            "test": test.name,
            "task": test.task.definition,
            "metric": test.task.metric,
            "items": len(test.items),
            "speakers": test.num_speakers,
            "sources": ", ".join(sorted({item.source for item in test.items})),
            "kind": test.kind,
            "counted": test.is_counted,
            "confounds": _confounds(test),
        }
        for test in tests
    ]


def _benchmark(name: str, entry: object, items: Sequence[Item]) -> Benchmark:
    if name == "speaker_count":
        return Benchmark(name, entry, "composed", tuple(items))
    is_synthetic = any(item.source == SYNTHESISED for item in items)
    return Benchmark(name, entry, "synthetic" if is_synthetic else "real", tuple(items))


def _item(example: Example, truth: Any) -> Item:
    return Item(str(example.path), example.speaker, example.source, truth, partial(read_waveform, example.path))


def _english(examples: Sequence[Example]) -> list[Example]:
    return [e for e in examples if e.lang == "en" and e.text and normalised(e.text)]


def _labelled(task: str, examples: Sequence[Example]) -> list[Item]:
    """Those whose label is one of the task's, by its own name or by the name that a manifest has for it."""
    labels = load_task(task, Path()).label_names
    items = []
    if task == "language":  # a source of one language would tell it by its microphone
        languages = {(e.source, e.lang) for e in examples if e.lang}
        examples = [e for e in examples if sum(source == e.source for source, _ in languages) > 1]
    for example in examples:
        truth = label_of(task, example)
        if truth in labels and (task != "accent" or example.lang == "en"):
            items.append(_item(example, truth))
    return items if len({item.truth for item in items}) > 1 else []


def _keyword_search(examples: Sequence[Example], seed: int) -> list[Item]:
    """Of each recording two words: one that is said and one that is not, which half of the time looks like it."""
    random = np.random.default_rng([seed, 1])
    spoken = _english(examples)
    vocabulary = sorted({w for e in spoken for w in normalised(e.text or "").split() if len(w) > 2})
    items = []
    for number, example in enumerate(spoken):
        said = normalised(example.text or "").split()
        present = str(random.choice([w for w in said if len(w) > 2] or said))
        alike = [w for w in lookalikes(present, vocabulary) if w not in said] if number % 2 else []
        absent = alike or [w for w in vocabulary if w not in said]
        if absent:
            items.append(_item(example, {present: True, str(random.choice(absent)): False}))
    return items


def _speech_activity(examples: Sequence[Example], seed: int) -> list[Item]:
    known = [e for e in examples if isinstance(e.labels.get("speech"), bool)]
    items = [_item(e, "speech" if e.labels["speech"] else "no_speech") for e in known]
    num_quiet = sum(item.truth == "no_speech" for item in items)
    for number in range(num_quiet if num_quiet < len(items) else 0):
        kind = NO_SPEECH[number % len(NO_SPEECH)]
        load = partial(without_speech, kind, [seed, 2, number])
        items.append(Item(f"{kind} {number}", None, f"generated {kind}", "no_speech", load))
    return items


def speaker_counts(examples: Sequence[Example], seed: int) -> list[Item]:
    """By turns one speaker and several, two or three clips each; all of one source, so that no microphone tells."""
    random = np.random.default_rng([seed, 3])
    speakers: dict[str, dict[str, list[Example]]] = {}
    for example in examples:
        if example.speaker and example.labels.get("speech") is not False:
            speakers.setdefault(example.source, {}).setdefault(example.speaker, []).append(example)
    repeated = {source: {s: own for s, own in by.items() if len(own) > 2} for source, by in speakers.items()}
    sources = {source: by for source, by in sorted(repeated.items()) if len(by) > 1}
    first = [(source, speaker) for source, by in sources.items() for speaker in by]
    items = []
    for number in range(MIXED if first else 0):
        source, speaker = first[(number // 2) % len(first)]
        num_clips = min(int(random.integers(2, 4)), len(sources[source]))
        others = [s for s in sources[source] if s != speaker]
        if number % 2:
            chosen = [speaker, *random.choice(others, num_clips - 1, replace=False)]
            clips = [sources[source][s][int(random.integers(len(sources[source][s])))] for s in chosen]
        else:
            own = sources[source][speaker]
            clips = [own[int(i)] for i in random.choice(len(own), num_clips, replace=False)]
        truth = "two" if number % 2 else "one"
        load = partial(joined, [clip.path for clip in clips], [seed, 4, number])
        names = ", ".join(clip.path.name for clip in clips)
        items.append(Item(f"mixture {number} of {names}", speaker, source, truth, load))
    return items


def _slots(examples: Sequence[Example]) -> Iterator[Benchmark]:
    """Slots that are none of the library's are asked under the names and descriptions of benchmarks.yaml."""
    spoken = [e for e in examples if isinstance(e.labels.get("slots"), dict)]
    seen = sorted({slot for example in spoken for slot in example.labels["slots"]})
    if not seen:
        return
    library = load_task("slots", Path()).label_names
    known = _settings()["slots"]
    own = {slot: known.get(slot, {"name": slot, "description": slot}) for slot in seen}
    entry: object = "slots" if set(seen) <= set(library) else {"slots": {"slots": list(own.values())}}
    names = {slot: slot if entry == "slots" else own[slot]["name"] for slot in seen}
    items = [_item(e, [(names[slot], value) for slot, value in e.labels["slots"].items()]) for e in spoken]
    yield _benchmark("slots", entry, items)


def _confounds(test: Benchmark) -> str:
    known = _settings()["confounds"]
    names = [test.name, *sorted({item.source for item in test.items})]
    return "; ".join(known[name] for name in names if name in known)


@cache
def _settings() -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("benchmarks.yaml").read_text(encoding="utf-8")
    )
    return settings
