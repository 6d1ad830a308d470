"""What the next runs of a job do, and how one ends early: the same bytes, failures, limits, shards, signals."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import yaml

from svbatch.errors import ExitCode
from svbatch.estimate import estimate
from svbatch.job import load_job
from svbatch.plan import Selection
from svbatch.run import Limits, Outcome, run
from svbatch.stop import SignalStop, Stopped
from svbatch.tables.store import Store


@pytest.fixture
def own(tmp_path, tiny_bundle, bursts) -> "Own":
    """A folder of its own with a job of one task, and no recordings yet."""
    (tmp_path / "recordings").mkdir()
    path = tmp_path / "job.yaml"
    path.write_text(
        f"corpus: recordings/\ntasks: [asr]\noutput: out/\nbundle: {tiny_bundle.folder}\n"
        "precision: float32\ndevice: cpu\n"
    )
    return Own(path, tiny_bundle.cache, bursts)


class Own:
    """A job whose recordings a test writes."""

    def __init__(self, path: Path, cache: Path, bursts: Callable) -> None:
        self.path, self.cache, self.bursts = path, cache, bursts

    def write(self, name: str, seed: int | None) -> Path:
        """Speech of this seed, or no sound at all."""
        path = self.path.parent / "recordings" / name
        if seed is None:
            path.write_text("no sound")
        else:
            soundfile.write(path, self.bursts(0.4, seed=seed), 16_000)
        return path

    def run(self, **options: object) -> Outcome:
        return run(load_job(self.path), cache=self.cache, quiet=True, **options)

    def rows(self, table: str) -> dict[str, dict]:
        """By name of recording; the job's recordings have one segment each."""
        listed = Store(self.path.parent / "out").read(table).to_pylist()
        rows = {Path(row["uri"]).name: row for row in listed}
        assert len(rows) == len(listed)
        return rows


def counts(outcome: Outcome) -> tuple[int, int, int, int]:
    return outcome.annotated, outcome.empty, outcome.failed, outcome.unchanged


def said(row: dict) -> dict:
    return {key: value for key, value in row.items() if key not in ("uri", "run_id", "annotated_at")}


def test_the_same_bytes_are_heard_once_and_have_rows_under_each_uri(own):
    own.write("a.wav", 1)
    own.write("b.wav", 1)
    own.write("c.wav", 2)
    outcome = own.run()
    assert counts(outcome) == (3, 0, 0, 0)
    assert outcome.audio_seconds == pytest.approx(0.8)
    own.write("d.wav", 2)
    later = own.run()
    assert (counts(later), later.audio_seconds) == ((1, 0, 0, 3), 0.0)
    rows, recordings = own.rows("asr"), own.rows("recordings")
    assert sorted(rows) == sorted(recordings) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert said(rows["a.wav"]) == said(rows["b.wav"]) != said(rows["c.wav"]) == said(rows["d.wav"])
    assert rows["d.wav"]["run_id"] == recordings["d.wav"]["run_id"] == later.run_id
    assert own.run().is_nothing_new


def test_a_file_that_was_only_touched_is_not_heard_again(own):
    os.utime(own.write("a.wav", 1), (1, 1))
    own.run()
    os.utime(own.path.parent / "recordings" / "a.wav", (2, 2))
    outcome = own.run()
    assert (counts(outcome), outcome.audio_seconds) == ((1, 0, 0, 0), 0.0)
    assert own.rows("recordings")["a.wav"]["modified_at"].timestamp() == 2
    assert own.run().is_nothing_new


def test_bytes_whose_answers_go_in_the_same_commit_are_heard_after_all(own):
    """a.wav gets other bytes in the night in which b.wav gets its old ones."""
    own.write("a.wav", 1)
    own.run()
    before = said(own.rows("asr")["a.wav"])
    own.write("b.wav", 1)
    os.utime(own.write("a.wav", 2), (1, 1))
    outcome = own.run()
    assert counts(outcome) == (2, 0, 0, 0)
    assert outcome.audio_seconds == pytest.approx(0.8)
    assert said(own.rows("asr")["b.wav"]) == before != said(own.rows("asr")["a.wav"])


def test_a_failure_is_done_until_it_is_retried(own):
    own.write("a.wav", 1)
    own.write("bad.wav", None)
    assert counts(own.run()) == (1, 0, 1, 0)
    assert counts(own.run()) == (0, 0, 0, 2)
    retried = own.run(retry_failures=True)
    assert (counts(retried), retried.exit_code) == ((0, 0, 1, 1), ExitCode.FAILURES)
    assert list(retried.failures) == [("decode", "no_audio")]
    assert len(own.rows("failures")) == 1


def test_a_run_of_limited_time_ends_after_a_batch_and_says_that_more_is_left(own, monkeypatch):
    monkeypatch.setattr("svbatch.plan.RECORDINGS_PER_BATCH", 2)
    for number in range(3):
        own.write(f"{number}.wav", number)
    first = own.run(limits=Limits(max_runtime_s=0.0))
    assert (first.exit_code, counts(first)) == (ExitCode.MORE, (2, 0, 0, 0))
    second = own.run(limits=Limits(max_runtime_s=0.0))
    assert (second.exit_code, counts(second)) == (ExitCode.ANSWERED, (1, 0, 0, 2))
    assert sorted(Store(own.path.parent / "out").read("runs")["exit_code"].to_pylist()) == [0, 75]


def test_a_run_in_which_too_much_fails_is_given_up(own, monkeypatch):
    monkeypatch.setattr("svbatch.plan.RECORDINGS_PER_BATCH", 5)
    for number in range(40):
        own.write(f"{number:02}.wav", 1 if number < 18 else None)
    outcome = own.run(limits=Limits(max_failure_rate=0.05))
    assert outcome.exit_code == ExitCode.FAILURES
    assert outcome.failed < 22
    assert "recordings failed, more than 5.0%" in outcome.ended[1]
    assert counts(own.run(limits=Limits(max_failure_rate=0.9)))[2:] == (22 - outcome.failed, 18 + outcome.failed)


def test_shards_answer_the_corpus_between_them(own):
    for number in range(6):
        own.write(f"{number}.wav", number)
    asked = [sum(counts(own.run(selection=Selection(shard=(shard, 2))))) for shard in (1, 2)]
    assert sum(asked) == 6
    assert own.run().unchanged == 6


def test_a_dry_run_tells_hours_questions_and_time_and_writes_nothing(own):
    own.write("a.wav", 1)
    said = estimate(load_job(own.path), cache=own.cache, selection=Selection(), retry_failures=False)
    assert said.splitlines() == [
        "to ask: 1 recordings, 0.00 hours of audio, 1 questions (one for each task of a recording)",
        "unchanged: 0 recordings",
        "time: unknown before a first run with this output",
    ]
    assert not (own.path.parent / "out").exists()
    own.run()
    own.write("b.wav", 2)
    own.write("bad.wav", None)
    before = {path: path.stat().st_mtime_ns for path in own.path.parent.rglob("*")}
    said = estimate(load_job(own.path), cache=own.cache, selection=Selection(), retry_failures=False)
    assert said.splitlines()[:3] == [
        "to ask: 2 recordings, 0.00 hours of audio, 2 questions (one for each task of a recording)",
        "unchanged: 1 recordings",
        "of unknown length: 1 recordings, not in the hours",
    ]
    assert said.splitlines()[3].startswith("time: about 0.")
    assert {path: path.stat().st_mtime_ns for path in own.path.parent.rglob("*")} == before


SLOW = """
import sys, time
import svbatch.annotate, svbatch.plan
svbatch.plan.RECORDINGS_PER_BATCH = 1
annotate = svbatch.annotate.annotate
def slowly(recordings, *rest):
    if recordings[0].uri.endswith("b.wav"):
        print("at b.wav", flush=True)
        time.sleep(60)
    return annotate(recordings, *rest)
svbatch.annotate.annotate = slowly
from svbatch.cli import entry
entry()
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_drops_the_batch_in_hand_and_commits_what_is_answered(own, signum, code):
    for name, seed in (("a.wav", 1), ("b.wav", 2)):
        own.write(name, seed)
    line = [sys.executable, "-c", SLOW, "run", str(own.path), "--quiet", "--cache", str(own.cache)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process.stdout, process.stderr:
        assert process.stdout.readline() == "at b.wav\n"
        process.send_signal(signum)
        assert process.wait(20) == code
        assert "stopped by a signal; the next run goes on from here" in process.stderr.read()
    assert sorted(own.rows("recordings")) == ["a.wav"]
    [row] = Store(own.path.parent / "out").read("runs").to_pylist()
    assert (row["annotated"], row["exit_code"]) == (1, code)
    assert counts(own.run()) == (1, 0, 0, 1)


def test_a_signal_in_a_commit_waits_for_its_end_and_a_second_one_does_not(monkeypatch):
    exits: list[int] = []
    before = signal.getsignal(signal.SIGINT)  # a shell has background jobs ignore it
    monkeypatch.setattr("os._exit", exits.append)

    def commit() -> None:
        with SignalStop() as stop, stop.committing():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert exits == []
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert exits == [130]
            exits.append(0)  # the commit's last line

    with pytest.raises(Stopped) as raised:
        commit()
    assert exits == [130, 0]
    assert raised.value.exit_code == 130  # the second's: this process was not allowed to end on the spot
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_sets_no_handlers():
    handlers = []

    def enter() -> None:
        with SignalStop():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


def test_a_run_needs_no_environment_and_no_home(own):
    """The nightly job's own lines, over recordings of this test."""
    own.write("a.wav", 1)
    shipped = (Path(__file__).parents[1] / "jobs" / "nightly.yaml").read_text()
    text = shipped.replace("/srv/recordings/", "recordings/").replace("/srv/answers/", "out/")
    bundle = load_job(own.path).bundle
    own.path.write_text(text + f"bundle: {bundle}\n")
    line = ["env", "-i", sys.executable, "-m", "svbatch", "run", str(own.path), "--quiet", "--cache", str(own.cache)]
    done = subprocess.run(line, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert sorted(own.rows("keyword_search")) == ["a.wav"]
    own.write("b.wav", 2)
    bare = subprocess.run(line[:-2], cwd="/", capture_output=True, text=True, check=False)
    assert bare.returncode == 2
    assert all(name in bare.stderr for name in ("--cache", "SVBATCH_CACHE", "XDG_CACHE_HOME"))


def test_the_job_in_the_docs_is_the_one_that_is_shipped():
    root = Path(__file__).parents[1]
    shipped = (root / "jobs" / "nightly.yaml").read_text()
    [block] = re.findall(
        r"```yaml\n# jobs/nightly.yaml\n(.*?)```", (root / "docs" / "nightly.md").read_text(), re.DOTALL
    )
    assert yaml.safe_load(block) == yaml.safe_load(shipped)
