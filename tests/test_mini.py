"""The shipped bundle on real speech. Slow: `pytest -m slow`; SVBATCH_TEST_DATA names a folder with dev.jsonl."""

import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

pytestmark = pytest.mark.slow
JOBS = Path(__file__).parents[1] / "jobs"


@pytest.fixture(scope="module")
def data() -> Path:
    folder = os.environ.get("SVBATCH_TEST_DATA")
    if not folder:
        pytest.skip("SVBATCH_TEST_DATA is not set: it names a folder with dev.jsonl and its recordings")
    return Path(folder)


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


def test_recogniser_reads_librispeech_with_at_most_six_percent_errors(data: Path) -> None:
    from svbatch.bundle import find_bundle
    from svbatch.fetch import fetch
    from svbatch.model import load_model
    from svbatch.training.data import read_manifest
    from svbatch.training.evaluate import evaluate

    bundle = find_bundle("mini")
    fetch(bundle)
    examples = [e for e in read_manifest(data / "dev.jsonl") if e.source == "librispeech_devclean"]
    figures = evaluate(examples, load_model(bundle, "cpu", "float32"), seed=0)
    assert figures["asr"]["librispeech_devclean"]["recogniser"] <= 6.0
