from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from svbatch.errors import ExitCode, OutputError
from svbatch.job import Job, load_job
from svbatch.metrics import check_metrics_file, write_metrics
from svbatch.run import Outcome, run

STARTED = datetime(2026, 1, 2, tzinfo=UTC)
OUTCOME = Outcome("run", STARTED, STARTED + timedelta(seconds=90), 5, 2, 1, 100, 3, 61.5)


@pytest.fixture(scope="module")
def job(tmp_path_factory, corpus_dir, tiny_bundle) -> Job:
    folder = tmp_path_factory.mktemp("metrics")
    text = f"corpus: {corpus_dir}/silent.wav\ntasks: [asr]\noutput: out\nbundle: {tiny_bundle.folder}\n"
    (folder / "nightly.yaml").write_text(text)
    return load_job(folder / "nightly.yaml")


def written(path: Path) -> dict[tuple[str, ...], float]:
    """Values by name and labels but `job`, which is checked."""
    values = {}
    for family in text_string_to_metric_families(path.read_text()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("job") == "nightly"
            values[sample.name.removeprefix("svbatch_"), *labels.values()] = sample.value
    return values


def test_the_figures_of_a_run_are_written(job, tmp_path):
    path = tmp_path / "svbatch.prom"
    path.write_text("old")
    job.output.mkdir(exist_ok=True)
    write_metrics(path, job, replace(OUTCOME, ended=(ExitCode.MORE, "time is up")))
    assert written(path) == {
        ("recordings", "annotated"): 5,
        ("recordings", "empty"): 2,
        ("recordings", "failed"): 1,
        ("recordings", "unchanged"): 100,
        ("unanswered_questions",): 3,
        ("audio_seconds",): 61.5,
        ("run_duration_seconds",): 90,
        ("run_end_timestamp_seconds",): OUTCOME.ended_at.timestamp(),
        ("exit_code",): 75,
    }
    assert list(tmp_path.iterdir()) == [path]


def test_the_last_success_is_that_of_the_output_whatever_this_run_was(job, tiny_bundle, tmp_path):
    outcome = run(job, cache=tiny_bundle.cache, quiet=True)
    assert outcome.exit_code == 0
    write_metrics(tmp_path / "x.prom", job, replace(OUTCOME, ended=(ExitCode.FAILURES, "too many")))
    assert written(tmp_path / "x.prom")["last_success_timestamp_seconds",] == outcome.ended_at.timestamp()


def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    for path in (tmp_path, tmp_path / "no" / "x.prom"):
        with pytest.raises(OutputError, match="metrics cannot be written there; give --metrics a file in a folder"):
            check_metrics_file(path)
    check_metrics_file(tmp_path / "x.prom")
