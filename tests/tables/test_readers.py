"""What other tools see while svbatch writes."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest
from deltalake import DeltaTable

from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store

ROOT = Path(__file__).parents[2]
TABLES = ["asr", "failures", "recordings", "runs"]
WRITER = """
import sys
sys.path.append(sys.argv[2])
from batches import commit
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store

store = Store(sys.argv[1])
with store.lock():
    store.prepare({"asr": arrow_schema("asr")})
    print("locked", flush=True)
"""
FIRST_RUN = """
    for batch in range(150):
        commit(store, {f"/{batch}/{n}": f"{batch}" for n in range(3)}, failed=[(f"/{batch}/0", f"{batch}", "asr", "x")])
"""
REPLACING = """
    for turn in range(100_000):
        commit(store, {f"/{n}": f"turn {turn}" for n in range(5)}, version=str(turn))
        if turn % 3 == 2:
            store.tables.compact("asr")
            store.tables.rest("asr")
"""


@pytest.fixture
def writer(tmp_path):
    """Starts a process that writes an output until the test ends."""
    processes = []

    def start(code, name="out"):
        output = tmp_path / name
        command = [sys.executable, "-c", WRITER + code, str(output), str(Path(__file__).parent)]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout.readline() == b"locked\n"
        return output

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def by_duckdb(glob):
    relation = duckdb.sql(f"FROM '{glob}'")
    return relation.columns, relation.fetchall()


def by_polars(glob):
    frame = pl.read_parquet(glob)
    return frame.columns, frame.rows()


def by_pandas(glob):
    frames = [pd.read_parquet(path) for path in sorted(Path(glob).parent.glob("*.parquet"))]
    frame = pd.concat([each for each in frames if len(each)] or frames[:1])
    return list(frame.columns), frame.itertuples(index=False)


def read_while_a_first_run_goes_on(output, times):
    """Reads every table by the plain glob with every tool; returns how many rows of answers were seen at last."""
    num_rows = 0
    for turn in range(times):
        for table in TABLES:
            read = (by_duckdb, by_polars, by_pandas)[turn % 3]
            columns, rows = read(f"{output}/{table}/*.parquet")
            assert columns == arrow_schema(table).names
            place = columns.index("uri") if "uri" in columns else 0
            starts = columns.index("start") if "start" in columns else place
            keys = Counter((row[place], row[starts]) for row in rows if row[place] == row[place])
            assert max(keys.values(), default=1) == 1
            if table == "asr":
                assert len(keys) % 6 == 0  # a batch is seen whole: three recordings with two segments
                assert len(keys) >= num_rows
                num_rows = len(keys)
    return num_rows


def test_the_plain_glob_is_never_half_or_double_while_a_first_run_goes_on(writer):
    assert read_while_a_first_run_goes_on(writer(FIRST_RUN), 50) > 0


@pytest.mark.slow
def test_the_plain_glob_a_thousand_times(writer):
    """Twenty first runs, of 150 batches each."""
    for run in range(20):
        read_while_a_first_run_goes_on(writer(FIRST_RUN, f"out-{run}"), 50)


def old_and_new(output, times, num_versions):
    """Reads the Delta table while answers are replaced, so many times and until so many versions were seen; these, and
    how many reads there were and how many found a file gone."""
    seen, turn, gone = Counter(), 0, 0
    while turn < times or len(seen) < num_versions:
        turn += 1
        try:
            if turn % 2:
                rows = pl.scan_delta(str(output / "asr")).select("uri", "task_version").collect().rows()
            else:
                table = DeltaTable(output / "asr").to_pyarrow_dataset().to_table(["uri", "task_version"])
                rows = list(zip(*table.to_pydict().values(), strict=True))
        except (FileNotFoundError, OSError, pl.exceptions.ComputeError):
            gone += 1  # the file was of a version that is no more: the reader tries again
            continue
        assert sorted(Counter(uri for uri, _ in rows).values()) in ([], [2] * 5)
        assert len(set(rows)) in (0, 5)  # each recording has its answers of one version, all of one commit
        assert len({version for _, version in rows}) <= 1
        seen.update(version for _, version in rows)
    return seen, turn, gone


def test_old_and_new_answers_are_never_seen_together(writer):
    output = writer(REPLACING)
    old_and_new(output, 60, 4)


@pytest.mark.slow
def test_old_and_new_answers_are_never_seen_together_a_thousand_times(writer):
    output = writer(REPLACING)
    started = time.monotonic()
    seen, num_reads, gone = old_and_new(output, 1000, 100)
    seconds = time.monotonic() - started
    print(f"{len(seen)} versions seen, {gone} of {num_reads} reads found a file gone, {seconds:.0f} s")


def test_the_store_reads_what_it_writes_at_any_time(writer):
    output = writer(REPLACING)
    store = Store(output, make=False)
    assert {len(store.recordings()) for _ in range(20)} <= {0, 5}
