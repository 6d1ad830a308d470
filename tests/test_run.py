import shutil
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pytest

from svbatch.bundle import Bundle
from svbatch.errors import BundleError, BusyError, TaskError
from svbatch.job import Job, load_job
from svbatch.report import report
from svbatch.run import Outcome, run
from svbatch.tables.store import Store
from svbatch.tasks.task import LIBRARY_DIR

TABLES = ("asr", "keyword_search", "speech_activity", "recordings", "failures", "runs")


def job_in(folder: Path, bundle: Bundle, keywords: str = "rain, a") -> Job:
    path = folder / "job.yaml"
    path.write_text(
        "corpus: recordings/\n"
        "tasks:\n"
        "  - asr\n"
        f"  - keyword_search: {{keywords: [{keywords}]}}\n"
        "  - speech_activity\n"
        "output: out/\n"
        f"bundle: {bundle.folder}\n"
        "precision: float32\n"
        "device: cpu\n"
    )
    return load_job(path)


@pytest.fixture(scope="module")
def folder(corpus_dir, tmp_path_factory) -> Path:
    """The four recordings and a broken one."""
    path = tmp_path_factory.mktemp("job")
    shutil.copytree(corpus_dir, path / "recordings")
    (path / "recordings" / "broken.wav").write_bytes(b"RIFF but no more")
    return path


@pytest.fixture(scope="module")
def first(folder, tiny_bundle) -> tuple[Job, Outcome]:
    job = job_in(folder, tiny_bundle)
    return job, run(job, cache=tiny_bundle.cache, quiet=True)


def sorted_rows(table: pa.Table) -> list[dict]:
    return sorted(table.to_pylist(), key=repr)


def test_a_run_counts_its_recordings(first):
    job, outcome = first
    assert (outcome.annotated, outcome.empty, outcome.failed, outcome.unchanged) == (3, 1, 1, 0)
    assert outcome.audio_seconds == pytest.approx(31.0)
    assert outcome.exit_code == 3
    row = next(row for row in Store(job.output).read("runs").to_pylist() if row["run_id"] == outcome.run_id)
    assert (row["recordings"], row["annotated"], row["empty"], row["failed"]) == (5, 3, 1, 1)
    assert (row["device"], row["precision"], row["exit_code"]) == ("cpu", "float32", 3)


@pytest.mark.parametrize("table", TABLES)
def test_the_plain_glob_shows_the_table_in_polars_and_duckdb(first, table):
    job, _ = first
    expected = Store(job.output).read(table)
    glob = f"{job.output}/{table}/*.parquet"
    seen_by_polars = pl.read_parquet(glob).to_arrow().cast(expected.schema)
    seen_by_duckdb = duckdb.sql(f"SELECT * FROM '{glob}'").to_arrow_table()
    assert sorted_rows(seen_by_polars) == sorted_rows(expected)
    assert seen_by_duckdb.column_names == expected.column_names
    assert seen_by_duckdb.num_rows == expected.num_rows
    assert sorted(map(str, seen_by_duckdb[0].to_pylist())) == sorted(map(str, expected[0].to_pylist()))


def test_nothing_lies_under_a_tables_folder_but_its_files_and_its_log(first):
    job, _ = first
    for table in TABLES:
        assert {path.suffix or path.name for path in (job.output / table).iterdir()} == {".parquet", "_delta_log"}


def test_the_report_says_what_came_out_and_how_to_open_it(first):
    job, outcome = first
    lines = report(job, outcome).splitlines()
    assert lines[0] == "5 recordings: 3 annotated, 1 without speech, 1 failed, 0 unchanged; 31 s of audio"
    assert "failures: 1 rows" in lines
    assert any("broken.wav" in line for line in lines)
    assert lines[-2].strip() == f'polars:  pl.read_parquet("{job.output}/asr/*.parquet")'
    assert lines[-1].strip() == f"duckdb:  SELECT * FROM '{job.output}/asr/*.parquet'"


def test_a_second_run_asks_nothing_and_is_recorded(first, tiny_bundle):
    job, _ = first
    before = {table: sorted_rows(Store(job.output).read(table)) for table in TABLES if table != "runs"}
    outcome = run(job, cache=tiny_bundle.cache, quiet=True)
    assert outcome.is_nothing_new
    assert (outcome.unchanged, outcome.exit_code) == (5, 0)
    assert {table: sorted_rows(Store(job.output).read(table)) for table in before} == before
    row = next(row for row in Store(job.output).read("runs").to_pylist() if row["run_id"] == outcome.run_id)
    assert (row["unchanged"], row["device"]) == (5, None)
    assert report(job, outcome) == f"nothing new: all 5 recordings have their answers in {job.output}"


def test_changed_keywords_ask_that_task_anew_and_keep_the_rest(first, folder, tiny_bundle):
    job, _ = first
    store = Store(job.output)
    before = {table: sorted_rows(store.read(table)) for table in ("asr", "speech_activity")}
    statuses = dict(zip(*(store.read("recordings")[name].to_pylist() for name in ("uri", "status")), strict=True))
    changed = job_in(folder, tiny_bundle, keywords="snow")
    assert run(changed, cache=tiny_bundle.cache, quiet=True).unchanged == 0
    assert {table: sorted_rows(store.read(table)) for table in before} == before
    rows = store.read("keyword_search").to_pylist()
    assert len(rows) == len(before["asr"])
    assert {keyword["keyword"] for row in rows for keyword in row["keywords"]} == {"snow"}
    recordings = store.read("recordings").to_pylist()
    assert {row["uri"]: row["status"] for row in recordings} == statuses
    assert all(sorted(a.split("@")[0] for a in row["answered"]) == sorted(TABLES[:3]) for row in recordings)
    assert len(store.read("failures")) == 1


def test_silence_is_answered_by_speech_activity_and_never_planned_again(corpus_dir, tiny_bundle, tmp_path):
    (tmp_path / "recordings").mkdir()
    shutil.copy(corpus_dir / "silent.wav", tmp_path / "recordings")
    job = job_in(tmp_path, tiny_bundle)
    outcome = run(job, cache=tiny_bundle.cache, quiet=True)
    assert (outcome.empty, outcome.exit_code) == (1, 0)
    store = Store(job.output)
    assert [store.read(table).num_rows for table in TABLES[:3]] == [0, 0, 1]
    [recording] = store.read("recordings").to_pylist()
    assert (recording["status"], len(recording["answered"])) == ("empty", 3)
    again = run(job, cache=tiny_bundle.cache, quiet=True)
    assert (again.is_nothing_new, again.unchanged) == (True, 1)


def test_an_output_in_use_is_left_alone(first, tiny_bundle):
    job, _ = first
    with Store(job.output).lock(), pytest.raises(BusyError, match=r"is writing there; try again") as raised:
        run(job, cache=tiny_bundle.cache, quiet=True)
    assert raised.value.exit_code == 75


def test_a_bundle_that_is_not_trained_is_refused(folder, tiny_base, tmp_path):
    job = job_in(folder, tiny_base).model_copy(update={"output": tmp_path / "out"})
    with pytest.raises(BundleError, match=r"has no projector or adapter; train them with `svbatch train`"):
        run(job, cache=tiny_base.cache, quiet=True)


def test_a_users_own_labels_are_asked_and_have_a_table_of_their_own(corpus_dir, tiny_bundle, tmp_path):
    own = (LIBRARY_DIR / "speech_activity.yaml").read_text().replace("name: speech_activity", "name: presence")
    (tmp_path / "presence.yaml").write_text(own)
    path = tmp_path / "job.yaml"
    path.write_text(
        f"corpus: {corpus_dir}/silent.wav\ntasks: [./presence.yaml]\noutput: out/\nbundle: {tiny_bundle.folder}\n"
    )
    assert run(load_job(path), cache=tiny_bundle.cache, quiet=True).exit_code == 0
    [row] = Store(tmp_path / "out").read("presence").to_pylist()
    assert row["label"] in ("speech", "no_speech")
    assert not row["calibrated"]  # the bundle's temperature was fitted for the library's task


def test_a_jobs_own_words_that_the_llm_cannot_hold_are_refused_by_the_job(folder, tiny_bundle, tmp_path):
    path = tmp_path / "job.yaml"
    question = "word " * 2000
    path.write_text(
        f"corpus: {folder}\ntasks: [question: {{question: {question}}}]\noutput: out/\nbundle: {tiny_bundle.folder}\n"
    )
    with pytest.raises(TaskError, match=r"job\.yaml: tasks: question: .* 30 s of speech; shorten `question`"):
        run(load_job(path), cache=tiny_bundle.cache, quiet=True)


def test_a_keyword_that_is_neither_present_nor_absent_is_reported_as_a_question(corpus_dir, tiny_bundle, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(
        f"corpus: {corpus_dir}/short.flac\ntasks: [keyword_search: {{keywords: [rain], min_probability: 1.0}}]\n"
        f"output: out/\nbundle: {tiny_bundle.folder}\n"
    )
    job = load_job(path)
    outcome = run(job, cache=tiny_bundle.cache, quiet=True)
    [row] = Store(job.output).read("keyword_search").to_pylist()
    assert row["keywords"][0]["present"] is None
    assert f"rain? ({row['keywords'][0]['probability']:.2f})" in report(job, outcome)


@pytest.mark.parametrize("text", ["instructions: [{}]", "instructions: [Short]\nmax_tokens: 5000"])
def test_a_question_that_the_llm_cannot_hold_is_refused_by_its_file(folder, tiny_bundle, tmp_path, text):
    """The tiny LLM holds 2048 positions."""
    (tmp_path / "long.yaml").write_text(
        "name: long\nversion: 1\ndescription: Too long.\nanswer: text\n" + text.format("word " * 900)
    )
    path = tmp_path / "job.yaml"
    path.write_text(f"corpus: {folder}\ntasks: [./long.yaml]\noutput: out/\nbundle: {tiny_bundle.folder}\n")
    with pytest.raises(TaskError, match=r"long\.yaml: task long: .* and the LLM holds 1248 beside 30 s of speech"):
        run(load_job(path), cache=tiny_bundle.cache, quiet=True)
