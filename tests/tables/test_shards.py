"""Shards of one output: separate processes, each with its own recordings."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from batches import expected, texts

from svbatch.errors import BusyError
from svbatch.tables.delta import Tables
from svbatch.tables.folder import Folder
from svbatch.tables.store import Store
from svbatch.tables.verify import verify

ROOT = Path(__file__).parents[2]


def start(output, shard, turns, batches):
    command = [sys.executable, str(Path(__file__).parent / "shards.py"), output, shard, turns, batches]
    return subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(shards, turns, batches):
    """What the last turn of these shards has said, by uri."""
    return {
        f"/{shard}/{batch}/{number}": f"{shard} {batch} {number} {turns - 1}"
        for shard in shards
        for batch in range(batches)
        for number in range(3)
    }


def write(output, num_shards, turns, batches):
    """Shards write an output at the same time; checks that nothing is lost, double or in the way."""
    shards = [f"{number}/{num_shards}" for number in range(1, num_shards + 1)]
    processes = [start(output, shard, turns, batches) for shard in shards]
    ended = [(process.communicate()[1], process.returncode) for process in processes]
    assert ended == [("", 0)] * num_shards
    store = Store(output)
    whole = expected(said(shards, turns, batches))
    failed = [f"/{shard}/{batch}/0" for shard in shards for batch in range(batches)]
    assert texts(store) == whole
    assert sorted(store.read("failures")["uri"].to_pylist()) == sorted(failed)
    with store.lock():
        store.tidy()
    assert verify(store) == []
    assert texts(store) == whole


def test_four_shards_write_at_the_same_time_and_nothing_is_lost_or_double(tmp_path):
    write(tmp_path / "out", num_shards=4, turns=2, batches=2)


def uncommitted(output):
    """Whole files of the table asr that no entry of its log names."""
    log = b"".join(path.read_bytes() for path in sorted((output / "asr" / "_delta_log").glob("*.json")))
    names = [name for name in os.listdir(output / "asr") if name.endswith(".parquet")]
    return {name for name in names if name.encode() not in log}


def stop_between_file_and_commit(process, output):
    """Stops a shard while a file of its lies there that is not committed; the names of such files.

    Each new file is a moment to stop it. Whether that was between the two is looked up while it stands still; if not,
    it goes on to its next file."""
    seen = set(os.listdir(output / "asr"))
    while process.poll() is None:
        new = {name for name in os.listdir(output / "asr") if name.endswith(".parquet")} - seen
        if not new:
            continue
        process.send_signal(signal.SIGSTOP)
        _, state = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(state), "it ended"
        if found := uncommitted(output) - seen:
            return found
        seen |= new
        process.send_signal(signal.SIGCONT)
    raise AssertionError("it ended before it was stopped between a file and its commit")


@pytest.mark.parametrize("replaces", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["append", "replace"])
def test_a_shard_that_begins_between_anothers_file_and_its_commit_takes_nothing_from_it(tmp_path, replaces):
    output, batches = tmp_path / "out", 40
    if replaces:
        assert start(output, "1/2", 1, batches).communicate()[1] == ""
    first = start(output, "1/2", 1, batches)
    try:
        assert first.stdout.readline() == "locked\n"
        left = stop_between_file_and_commit(first, output)
        before = set(output.rglob("*.parquet"))
        second = start(output, "2/2", 2, 3)
        assert (second.communicate()[1], second.returncode) == ("", 0)
        assert before <= set(output.rglob("*.parquet"))
        assert uncommitted(output) >= left
        with pytest.raises(BusyError, match="shard 1/2"), Store(output).lock():
            pass
        first.send_signal(signal.SIGCONT)
        assert (first.communicate()[1], first.returncode) == ("", 0)
    finally:
        first.kill()  # also where it stands still
    store = Store(output)
    whole = expected(said(["1/2"], 1, batches) | said(["2/2"], 2, 3))
    assert texts(store) == whole
    assert before <= set(output.rglob("*.parquet"))
    with store.lock():
        store.tidy()
    assert verify(store) == []
    assert texts(store) == whole


@pytest.mark.slow
def test_eight_shards_append_fifty_times_each(tmp_path):
    write(tmp_path / "out", num_shards=8, turns=1, batches=50)


@pytest.mark.slow
def test_eight_shards_replace_at_the_same_time(tmp_path):
    write(tmp_path / "out", num_shards=8, turns=6, batches=3)


MAKER = """
import sys
from pathlib import Path
import pyarrow as pa
from svbatch.tables.delta import Tables
from svbatch.tables.folder import Folder

tables = Tables(Folder(Path(sys.argv[1]), make=True))
print("ready", flush=True)
for line in sys.stdin:
    tables.make(line.strip(), pa.schema([("recording_id", pa.string())]))
    print("made", flush=True)
"""


def test_shards_that_make_a_table_at_the_same_moment_all_find_it_made(tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MAKER, str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    shards = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes) for _ in range(6)]
    assert [shard.stdout.readline() for shard in shards] == ["ready\n"] * 6
    for number in range(30):
        for shard in shards:
            shard.stdin.write(f"table{number}\n")
            shard.stdin.flush()
        assert [shard.stdout.readline() for shard in shards] == ["made\n"] * 6
    assert [shard.communicate()[1] for shard in shards] == [""] * 6
    tables = Tables(Folder(tmp_path / "out", make=False))
    for number in range(30):
        assert len(tables.files(f"table{number}")) >= 1
        assert not tables.leftovers(f"table{number}")
