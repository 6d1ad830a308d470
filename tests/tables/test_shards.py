"""Shards of one output: separate processes, each with its own recordings."""

import os
import subprocess
import sys
from pathlib import Path

from batches import expected, texts

from svbatch.tables.store import Store
from svbatch.tables.verify import verify

ROOT = Path(__file__).parents[2]
TURNS = 3


def start(output, shard, turns=TURNS):
    command = [sys.executable, str(Path(__file__).parent / "shards.py"), str(output), shard, str(turns)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(shards, turn=TURNS - 1):
    return {
        f"/{shard}/{batch}/{number}": f"{shard} {batch} {number} {turn}"
        for shard in shards
        for batch in range(5)
        for number in range(3)
    }


def test_four_shards_write_at_the_same_time_and_nothing_is_lost_or_double(tmp_path):
    shards = [f"{number}/4" for number in range(1, 5)]
    processes = [start(tmp_path / "out", shard) for shard in shards]
    ended = [(process.communicate(timeout=240)[1], process.returncode) for process in processes]
    assert ended == [("", 0)] * 4
    store = Store(tmp_path / "out")
    assert texts(store) == expected(said(shards))
    assert sorted(store.read("failures")["uri"].to_pylist()) == [f"/{s}/{b}/0" for s in shards for b in range(5)]
    with store.lock():
        store.tidy()
    assert verify(store) == []
    assert texts(store) == expected(said(shards))
