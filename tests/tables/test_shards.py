"""Shards of one output: separate processes, each with its own recordings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from batches import expected, texts

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


@pytest.mark.slow
def test_eight_shards_append_fifty_times_each(tmp_path):
    write(tmp_path / "out", num_shards=8, turns=1, batches=50)


@pytest.mark.slow
def test_eight_shards_replace_at_the_same_time(tmp_path):
    write(tmp_path / "out", num_shards=8, turns=6, batches=3)
