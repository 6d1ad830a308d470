"""kill -9 at each step of compact, forget and migrate: after the next command all is whole, and forgotten is gone."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batches import asr, commit, expected, recordings, sha256, texts
from test_forget import SECRET, fill, secrets_in

from svbatch.tables.forget import NOTE, forget
from svbatch.tables.migrate import migrate
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store
from svbatch.tables.verify import files_without_hash, verify

ROOT = Path(__file__).parents[2]
# Kills itself before the n-th call of what changes files; a step of deltalake's own has a kill before and after it.
KILLED = """
import os, signal, sys
sys.path.append(sys.argv[3])
from deltalake import DeltaTable
from deltalake.table import TableOptimizer
from svbatch.tables import delta, forget, migrate, compact, folder
from svbatch.tables.store import Store
from batches import asr
from svbatch.tables.schemas import arrow_schema

left = int(sys.argv[2])

def counted(function):
    def call(*arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*arguments, **options)
    return call

delta.write_deltalake = counted(delta.write_deltalake)
changing = [(DeltaTable, "create"), (DeltaTable, "create_checkpoint"), (DeltaTable, "create_write_transaction")]
changing += [(TableOptimizer, "compact"), (folder.Folder, "write"), (folder.Path, "unlink")]
for owner, name in changing:
    setattr(owner, name, counted(getattr(owner, name)))
print("ready", flush=True)
store = Store(sys.argv[1])
with store.lock():
    COMMAND
"""
COMMANDS = {
    "compact": "compact.compact(store)",
    "forget": 'forget.forget(store.tables, ["/private/it\'s"])',
    "migrate": 'migrate.migrate(store, {"asr": arrow_schema("asr").remove(5)})',
}


def start(output, command, steps):
    code = KILLED.replace("COMMAND", COMMANDS[command])
    return subprocess.Popen(
        [sys.executable, "-c", code, str(output), str(steps), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )


def ends(process):
    process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL)
    return process.returncode == 0


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """An output with secrets and a history; for migrate, its recordings lack a column."""
    store = Store(tmp_path_factory.mktemp("filled") / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        fill(store)
        for number in range(3):
            commit(store, {f"/more/{number}": f"more {number}"})
    return store.output


OTHERS = (
    {"/other/a": "beta"}
    | {f"/other/{n}": f"other {n}" for n in range(3)}
    | {f"/more/{n}": f"more {n}" for n in range(3)}
)
ALL = OTHERS | {"/private/it's": "unspeakable"}


def after_compact(store):
    store.prepare({"asr": arrow_schema("asr")})
    store.tidy()
    assert texts(store) == expected(ALL)


def after_forget(store):
    """What the tombstone stands for is gone after any next command; where none was written yet, all is there."""
    store.tidy()
    if store.forgotten():
        assert secrets_in(store.output) == []
        assert texts(store) == expected(OTHERS)
    else:
        assert texts(store) == expected(ALL)
        forget(store.tables, ["/private/it's"])
    assert secrets_in(store.output) == []
    assert not (store.output / NOTE).exists()


def after_migrate(store):
    narrow = arrow_schema("asr").remove(5)
    migrate(store, {"asr": narrow})
    store.prepare({"asr": narrow})
    asides = [table for table in store.tables.names() if table.startswith("asr.until-")]
    assert len(asides) == 1
    rows = store.read(asides[0]).to_pylist()
    assert sorted((row["uri"], row["start"], row["text"]) for row in rows) == expected(ALL)
    assert store.read("asr").num_rows == 0
    assert not any("asr@v1" in keys for keys in store.recordings()["answered"].to_pylist())
    store.tidy()


AFTER = {"compact": after_compact, "forget": after_forget, "migrate": after_migrate}


def check(output, command):
    store = Store(output)
    with store.lock():
        AFTER[command](store)
    assert verify(store) == []
    assert files_without_hash(store) == 0


def killed_at(filled, folder, command, steps):
    """Whether the command ended before it was killed."""
    output = shutil.copytree(filled, folder / f"{command}-{steps}")
    ended = ends(start(output, command, steps))
    check(output, command)
    shutil.rmtree(output)
    return ended


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_kill_at_some_steps(filled, tmp_path, command, steps):
    killed_at(filled, tmp_path, command, steps)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_each_step(filled, tmp_path, command):
    steps = 0
    while not killed_at(filled, tmp_path, command, steps):
        steps += 1
    print(f"{command}: {steps} steps")
    assert steps > 3


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_random_moments(filled, tmp_path, command):
    """Also within deltalake's own steps, such as between a file and the log."""
    for turn in range(25):
        output = shutil.copytree(filled, tmp_path / f"{turn}")
        process = start(output, command, 10_000)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.012 * turn)
        process.kill()
        ends(process)
        check(output, command)


def test_the_secrets_are_there_to_begin_with(filled):
    assert secrets_in(filled) == SECRET
    assert sha256("unspeakable") in Store(filled, make=False).recordings()["recording_id"].to_pylist()
    assert asr(ALL).num_rows == 2 * recordings(ALL).num_rows
