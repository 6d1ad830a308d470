"""The shipped bundle on real speech. Slow: `pytest -m slow`; SVBATCH_TEST_DATA names a folder with dev.jsonl."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from svbatch.ask import read
from svbatch.generate import WEIGHT_ALONE, transcribe
from svbatch.hear import Span, hear
from svbatch.model import Model
from svbatch.tasks.task import load_task
from svbatch.training.benchmarks import benchmarks
from svbatch.training.data import read_manifest, read_waveform
from svbatch.training.evaluate import Systems, answer_all
from svbatch.training.figures import figures

pytestmark = pytest.mark.slow
JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "svbatch", "run", str(JOBS / "quickstart.yaml"), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return output


def test_quickstart_writes_down_what_was_said(quickstart: Path) -> None:
    texts = dict(
        pl.read_parquet(quickstart / "asr/*.parquet").select(pl.col("uri").str.split("/").list.last(), "text").rows()
    )
    assert texts.keys() == {"appointment.ogg", "delivery.ogg", "late.ogg", "refund.ogg"}
    assert "invoice" in texts["refund.ogg"]
    assert "train" in texts["late.ogg"]


def test_quickstart_tells_speech_from_silence_and_noise(quickstart: Path) -> None:
    rows = pl.read_parquet(quickstart / "speech_activity/*.parquet")
    labels = dict(rows.select(pl.col("uri").str.split("/").list.last(), "label").rows())
    assert {name for name, label in labels.items() if label == "no_speech"} == {"silence.ogg", "noise.ogg"}


def test_words_have_times_inside_their_recording(quickstart: Path) -> None:
    for row in pl.read_parquet(quickstart / "asr/*.parquet").to_dicts():
        starts = [word["start"] for word in row["words"]]
        assert [word["word"] for word in row["words"]] == row["text"].split()
        assert starts == sorted(starts)
        assert row["start"] <= starts[0]
        assert row["words"][-1]["end"] <= row["end"] + 0.08


def test_recogniser_reads_librispeech_with_at_most_six_percent_errors(held_out_data: Path, mini: Model) -> None:
    examples = [e for e in read_manifest(held_out_data / "dev.jsonl") if e.source == "librispeech_devclean"]
    transcripts = [test for test in benchmarks(examples, seed=0, written=False) if test.name == "asr"]
    said = answer_all(transcripts, mini, Systems(modes=(), wordings=False, cascade=mini, classifiers={}))
    [recogniser] = figures(transcripts, said, seed=0)
    assert recogniser.items == len(examples)
    assert recogniser.value <= 6.0


def test_a_draft_changes_the_text_of_no_recording(held_out_data: Path, mini: Model) -> None:
    question = load_task("asr", Path()).questions()[0]
    seconds = {True: 0.0, False: 0.0}
    compared = 0
    waveforms_of_all = _windows(held_out_data)
    while waveforms := list(itertools.islice(waveforms_of_all, 8)):
        with torch.inference_mode():
            hearings = hear([Span(waveform, 0.0, transcribed=False) for waveform in waveforms], mini)
            prefix = read(hearings, "audio", mini)
            texts = {}
            for drafts in (True, False):
                start = time.perf_counter()
                texts[drafts] = transcribe(
                    hearings, prefix, question, 120, mini, readout_weight=WEIGHT_ALONE, drafts=drafts
                )
                seconds[drafts] += time.perf_counter() - start
        assert [text.ids for text in texts[True]] == [text.ids for text in texts[False]]
        compared += len(waveforms)
    print(f"{compared} recordings, plain decoding takes {seconds[False] / seconds[True]:.2f} times as long")
    assert compared >= 400


def _windows(folder: Path) -> Iterator[NDArray[np.float32]]:
    """The first 30 s of every recording of dev.jsonl, those of like length together."""
    waveforms = [read_waveform(example.path)[: 30 * 16_000] for example in read_manifest(folder / "dev.jsonl")]
    return iter(sorted(waveforms, key=len))
