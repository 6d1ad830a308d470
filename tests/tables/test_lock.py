import subprocess
import sys

import pytest
from test_shards import start

from svbatch.errors import BusyError
from svbatch.tables.store import Store


def locked(store, shard=None):
    """Whether the output can be held so."""
    try:
        with store.lock(shard=shard):
            return True
    except BusyError:
        return False


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("held", "wanted", "goes"),
    [
        (None, None, False),
        (None, "1/3", False),
        ("1/3", None, False),
        ("1/3", "1/3", False),
        ("1/3", "2/3", True),
        ("1/3", "1/2", False),
        ("1/3", "2/4", False),
    ],
)
def test_one_alone_or_each_shard_once(output, held, wanted, goes):
    with Store(output).lock(shard=held):
        assert locked(Store(output), wanted) is goes
    assert locked(Store(output), wanted)


def test_who_holds_it_is_said(output):
    store = Store(output)
    with store.lock(shard="2/3"), pytest.raises(BusyError, match=r"process \d+ \(shard 2/3\) is writing there; try"):
        Store(output).lock().__enter__()


def test_a_lock_goes_with_its_process_and_leaves_nothing(output):
    process = start(output, "1/2", 1000, 5)
    assert process.stdout.readline() == "locked\n"
    store = Store(output)
    assert not locked(store)
    process.kill()
    process.communicate()
    assert locked(store)
    assert [path.name for path in output.iterdir() if path.is_file()] == [".svbatch.lock"]


def test_nothing_is_tidied_under_a_shard(output):
    store = Store(output)
    with store.lock(shard="1/2"):
        store.prepare({})
        orphan = output / "recordings" / "part-0.parquet"
        orphan.write_bytes(b"about to be committed by the other shard")
        store.tidy()
        assert orphan.exists()
    with store.lock():
        store.tidy()
    assert not orphan.exists()


TAKER = """
import sys, time
from svbatch.errors import BusyError
from svbatch.tables.store import Store
store, taken = Store(sys.argv[1]), 0
for _ in range(25):
    try:
        with store.lock(shard=sys.argv[2] if len(sys.argv) > 2 else None):
            mark = open(sys.argv[1] + ".mark", "x") if len(sys.argv) == 2 else None
            taken += 1
            time.sleep(0.003)
            if mark:
                __import__("os").remove(mark.name)
    except BusyError:
        pass
print(taken)
"""


def test_processes_that_take_turns_never_hold_it_together(output):
    """Each makes a file that must not exist while it holds the output alone."""
    command = [sys.executable, "-c", TAKER, str(output)]
    processes = [subprocess.Popen([*command, *shard], stdout=subprocess.PIPE, text=True) for shard in ([], [], ["1/2"])]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sum(map(int, printed)) > 0
