"""What asking takes, against what the process grew by; batches that stay within a limit."""

import ctypes
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svbatch.annotate import annotate
from svbatch.ask import ask
from svbatch.bundle import find_bundle
from svbatch.corpus.decode import decode
from svbatch.corpus.sources import iter_recordings
from svbatch.fetch import fetch
from svbatch.hear import Span, hear
from svbatch.memory import Questions, asking_bytes, fitting, prefix_lengths, questions_of
from svbatch.model import load_model
from svbatch.tasks.task import load_task

QUESTIONS = Questions(longest_closed=90, closed_tokens=200, open_tokens=120, num_open=2)


@given(lengths=st.lists(st.integers(1, 800), min_size=1, max_size=40), limit=st.integers(1, 2**31))
def test_every_segment_is_asked_once_in_order_within_the_limit_or_alone(tiny_model, lengths, limit):
    parts = [lengths[rows] for rows in fitting(QUESTIONS, lengths, tiny_model, limit)]
    assert [length for part in parts for length in part] == lengths
    assert all(len(part) == 1 or asking_bytes(QUESTIONS, part, tiny_model) <= limit for part in parts)


def test_little_memory_changes_no_answer(corpus_dir, tiny_model):
    tasks = [load_task(name, Path()) for name in ("asr", "speech_activity", "emotion", "keywords")]
    versions = {task.name: "1" for task in tasks}
    recordings = list(iter_recordings([str(corpus_dir)], corpus_dir))
    much = annotate(recordings, tasks, versions, tiny_model, "run")
    little = annotate(recordings, tasks, versions, tiny_model, "run", max_memory_bytes=1)
    for name in ("asr", "speech_activity", "emotion"):
        rows = [table.answers[name].drop_columns(["annotated_at"]).to_pylist() for table in (much, little)]
        assert [row["uri"] for row in rows[0]] == [row["uri"] for row in rows[1]]
        for one, other in zip(*rows, strict=True):
            assert one.get("probability") == pytest.approx(other.get("probability"), abs=1e-4)
    assert len(much.failures) == len(little.failures)


def grown_by(work: Callable[[], object]) -> int:
    """By how many bytes the process grew at most while `work` was done (Linux)."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def estimated_and_grown(folder: Path, num_segments: int) -> tuple[int, int]:
    """Bytes that asking the longest recordings of a folder is estimated to take, and by which this process grows."""
    bundle = find_bundle("mini")
    fetch(bundle)
    model = load_model(bundle, "cpu", "float32")
    names = ("asr", "intent", "emotion", "sentiment", "accent", "speech_activity", "slots", "translation")
    tasks = [load_task(name, Path()).model_copy(update={"max_tokens": 64}) for name in names]
    recordings = list(iter_recordings([str(folder)], folder))[: 3 * num_segments]
    with torch.inference_mode():
        spans = sorted((decode(r).waveform for r in recordings), key=len, reverse=True)[:num_segments]
        hearings = [h for span in spans for h in hear([Span(span, 0.0, transcribed=True)], model)]
        ask(tasks, hearings[:1], model)
        grown = grown_by(lambda: ask(tasks, hearings, model))
    return asking_bytes(questions_of(tasks, model), prefix_lengths(hearings, model), model), grown


@pytest.mark.slow
@pytest.mark.parametrize("num_segments", [8, 24])
def test_the_estimate_is_near_what_a_process_grows_by(held_out_data, num_segments, capsys):
    folder = held_out_data / "dev" / "librispeech_devclean"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # what other tests freed is not taken again
        estimate, grown = pool.submit(estimated_and_grown, folder, num_segments).result()
    with capsys.disabled():
        print(f"\n{num_segments} segments: estimated {estimate / 2**20:.0f} MiB, grown by {grown / 2**20:.0f} MiB")
    assert estimate == pytest.approx(grown, rel=0.2)
