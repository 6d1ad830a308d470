"""The conventional system of the same parts: the recogniser's transcript, then the same LLM in text mode.

For asr it is the transcript itself, for keyword_search a search for the word in it (both as SpeechVerse 4.1 has them);
tasks that hear the sound alone are a classifier's (svbatch.training.frame_classifier).
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from svbatch.bundle import Bundle, find_bundle
from svbatch.errors import BundleError
from svbatch.fetch import fetch
from svbatch.language.weights import load_language_model
from svbatch.model import Model, Precision, llm_folder
from svbatch.training.answering import Answered, Batch, mode_answers
from svbatch.training.benchmark import Benchmark
from svbatch.training.normaliser import normalised

SYSTEM = "cascade"


def load_cascade(bundle: Bundle, other: str | None, model: Model, precision: Precision) -> tuple[Model, str]:
    """`model` with the cascade's LLM, and what that LLM is: the one of the bundle `other`, with its adapter and
    calibration, or the bundle's own with neither. Raises BundleError where `other` has another LLM."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    if other is None:
        llm = load_language_model(llm_folder(bundle, dtype), dtype)
        return replace(model, llm=llm, calibration={}, habits={}), "the same LLM without an adapter"
    theirs = find_bundle(other, cache=bundle.cache_option)
    ours, whose = (b.manifest.fetched[b.manifest.llm.weights].sha256 for b in (bundle, theirs))
    if ours != whose or theirs.manifest.adapter is None:
        raise BundleError(
            f"--cascade {other}: its LLM is {whose[:12]}…, that of {bundle.ref} is {ours[:12]}…; "
            "take a bundle with the same LLM and an adapter of its own"
        )
    fetch(theirs)
    folder = theirs.path(theirs.manifest.adapter.weights).parent
    llm = load_language_model(llm_folder(bundle, dtype), dtype, adapter_dir=folder)
    fitted = dict(theirs.manifest.calibration)
    return replace(model, llm=llm, calibration=fitted, habits={}), f"the same LLM with the adapter of bundle {other}"


def cascade_answers(batch: Batch, model: Model) -> Iterator[Answered]:
    """What the cascade answers to the tests that words can answer; `model` has the cascade's LLM."""
    asked = []
    for test, items in batch.questions:
        if "transcript" not in test.task.hears:
            continue
        if test.task.definition == "asr" or isinstance(test.items[0].truth, Mapping):
            yield from (_from_words(test, item, batch) for item in items)
        else:
            asked.append((test, items))
    if asked:
        for each in mode_answers(replace(batch, questions=asked), "text", model, wordings=False):
            yield replace(each, system=SYSTEM)


def _from_words(test: Benchmark, item: int, batch: Batch) -> Answered:
    rows = batch.rows(test.task, test.items[item].recording)
    text = " ".join(batch.hearings[row].text for row in rows)
    truth = test.items[item].truth
    if not isinstance(truth, Mapping):
        return Answered(test.name, SYSTEM, 0, item, text)
    spoken = f" {normalised(text)} "
    return Answered(test.name, SYSTEM, 0, item, {word: f" {normalised(word)} " in spoken for word in truth})
