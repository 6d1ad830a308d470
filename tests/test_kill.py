"""Runs that are killed and started again, until one ends by itself: nothing is lost, double or left over."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
from deltalake import DeltaTable

from svbatch.bundle import Bundle
from svbatch.tables.store import Store
from svbatch.tables.verify import files_without_hash, verify

KEYS = {
    "asr": ["uri", "start"],
    "speech_activity": ["uri", "start"],
    "recordings": ["uri"],
    "failures": ["uri", "start", "task"],
}
OF_THE_RUN = ("run_id", "annotated_at", "failed_at")
# Everything is imported once; then, for each number of seconds on standard input, a child of its own runs `svbatch`
# and is killed when they have passed. A small batch, and a commit after each: kills land within commits too. Each
# recording that is asked is a line in a file, which no kill takes back.
SVBATCH = """
import os, signal, sys, time
import svbatch.annotate, svbatch.ask, svbatch.fetch, svbatch.gather, svbatch.model, svbatch.plan, svbatch.report
from svbatch.cli import entry
import svbatch.cli.run

svbatch.gather.SECONDS_PER_COMMIT = 0
svbatch.plan.RECORDINGS_PER_BATCH = 2
annotate, asked = svbatch.annotate.annotate, sys.argv.pop()

def counted(recordings, *rest):
    with open(asked, "a") as file:
        file.writelines(f"{each.uri}\\n" for each in recordings)
    return annotate(recordings, *rest)

svbatch.annotate.annotate = counted
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            entry()
        except SystemExit as left:
            os._exit(left.code)  # not in order: onnxruntime would wait for a thread of the parent
    started, exited = time.monotonic(), 0
    while not exited and time.monotonic() - started < float(line):
        time.sleep(0.002)
        exited, status = os.waitpid(child, os.WNOHANG)
    if not exited:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), time.monotonic() - started, flush=True)
"""


@dataclass
class Job:
    """A job over `num_recordings`: speech, the same bytes twice, silence and a broken file among them."""

    folder: Path
    bundle: Bundle
    code: str = SVBATCH

    @property
    def store(self) -> Store:
        return Store(self.folder / "out")

    @property
    def num_asked(self) -> int:
        """How many recordings have been asked, in all runs."""
        path = self.folder / "asked"
        return len(path.read_text().splitlines()) if path.exists() else 0

    @contextmanager
    def runner(self) -> Iterator[Callable[[float], tuple[int, float]]]:
        """Something that runs the job for so many seconds, and gives the exit code and how long it took."""
        line = [sys.executable, "-c", self.code, "run", "job.yaml", "--quiet", "--cache", self.bundle.cache, "asked"]
        process = subprocess.Popen(
            line, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def run(seconds: float) -> tuple[int, float]:
            print(seconds, file=process.stdin, flush=True)
            code, took = process.stdout.readline().split()
            return int(code), float(took)

        with process.stdin, process.stdout:
            yield run
            process.stdin.close()
            process.wait()

    def orphans(self) -> int:
        """How many Parquet files lie in the tables' folders that no log names."""
        return sum(len(self.at_rest(table)[0] - self.at_rest(table)[1]) for table in KEYS if self._is_table(table))

    def at_rest(self, table: str) -> tuple[set[str], set[str]]:
        """The names of a table's Parquet files: in its folder, and by its log."""
        folder = self.folder / "out" / table
        return {path.name for path in folder.glob("*.parquet")}, {
            Path(uri).name for uri in DeltaTable(folder).file_uris()
        }

    def _is_table(self, table: str) -> bool:
        return DeltaTable.is_deltatable(str(self.folder / "out" / table))

    def check_keys(self) -> None:
        """No key twice, and no answers of a recording half there."""
        for table, key in KEYS.items():
            if self._is_table(table):
                keys = [tuple(row.values()) for row in self.store.read(table).select(key).to_pylist()]
                assert len(keys) == len(set(keys)), f"{table}: a key twice"


def job_of(num_recordings: int, folder: Path, bundle: Bundle, bursts) -> Job:
    recordings = folder / "recordings"
    recordings.mkdir(parents=True)
    for number in range(num_recordings):
        path = recordings / f"{number:04}.wav"
        if number % 10 == 3:
            path.write_text(f"no sound: {number}")
        elif number % 10 == 5:
            path.write_bytes((recordings / f"{number - 3:04}.wav").read_bytes())
        elif number % 10 == 7:
            soundfile.write(path, np.zeros(1000 + number, np.float32), 16_000)
        else:
            soundfile.write(path, bursts(0.3, seed=number), 16_000)
    (folder / "job.yaml").write_text(
        "corpus: recordings/\ntasks: [asr, speech_activity]\noutput: out/\nprecision: float32\ndevice: cpu\n"
        f"bundle: {bundle.folder}\n"
    )
    return Job(folder, bundle)


def rows(table: pa.Table) -> list[dict]:
    """Without what tells one run from another; numbers to 4 digits, since a batch may be another."""

    def rounded(value: object) -> object:
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, list):
            return [rounded(each) for each in value]
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return value

    kept = [{key: rounded(v) for key, v in row.items() if key not in OF_THE_RUN} for row in table.to_pylist()]
    return sorted(kept, key=repr)


def check_kills(num_recordings: int, num_kills: int, folder: Path, bundle: Bundle, bursts) -> None:
    job = job_of(num_recordings, folder, bundle, bursts)
    chance = random.Random(num_kills)
    orphans = 0
    with job.runner() as run:
        code, seconds = run(3600)
        assert code == 3
        undisturbed = {table: rows(job.store.read(table)) for table in KEYS}
        asked_undisturbed = job.num_asked
        (folder / "out").rename(folder / "undisturbed")
        (folder / "asked").unlink()
        killed = 0
        while killed < num_kills:
            code, _ = run(chance.uniform(0.0, seconds / num_kills + 0.3))
            if code != -9:
                break
            killed += 1
            orphans += job.orphans()
            job.check_keys()
        assert killed == num_kills, "the run ended before its last kill: it is shorter than the kills take"
        code, _ = run(3600)
    assert code in (0, 3)  # 0 if all failures were committed before the last kill
    assert {table: rows(job.store.read(table)) for table in KEYS} == undisturbed
    assert job.num_asked <= asked_undisturbed + 2 * num_kills, "more work lost than a batch per kill"
    for in_folder, in_log in map(job.at_rest, KEYS):
        assert in_folder == in_log
    assert list((folder / "out").rglob("*#*")) == []
    assert verify(job.store) == []
    assert files_without_hash(job.store) == 0
    print(
        f"{num_kills} kills, {num_recordings} recordings, {seconds:.1f} s undisturbed; asked {job.num_asked}, "
        f"undisturbed {asked_undisturbed}; {orphans} files were left between file and log"
    )


def test_a_run_killed_ten_times_gives_the_rows_of_one_that_was_not(tmp_path, tiny_bundle, bursts):
    check_kills(40, 10, tmp_path, tiny_bundle, bursts)


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_gives_the_rows_of_one_that_was_not(tmp_path, tiny_bundle, bursts):
    check_kills(300, 100, tmp_path, tiny_bundle, bursts)
