import json
import random
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from batches import asr, commit, failures, recordings
from deltalake import write_deltalake

from svbatch.errors import BusyError
from svbatch.tables.forget import NOTE
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import Store
from svbatch.tables.verify import verify


@pytest.fixture
def whole(tmp_path):
    """An output at rest, with failures, an empty recording, replaced answers and a run."""
    store = Store(tmp_path / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        commit(store, {"/a": "alpha", "/b": "beta", "/bad": None}, failed=[("/bad", None, None, "unreadable")])
        commit(store, {"/a": "alpha", "/cut": "cut"}, failed=[("/a", "alpha", "asr", "cut")])
        store.append_run(run_row(recordings=4, annotated=3, failed=1))
        store.tidy()
    return store


def run_row(**counts):
    now = datetime.now(UTC)
    row = {"run_id": "r1", "started_at": now, "ended_at": now, "job": "job.yaml", "bundle": "b", "device": "cpu"}
    row |= {"precision": "float32", "audio_seconds": 1.0, "exit_code": 3, "version": "0"}
    return table_of("runs", [row | dict.fromkeys(["annotated", "unchanged", "empty", "failed"], 0) | counts])


def file_of(store, table):
    return max((store.output / table).glob("*.parquet"), key=lambda path: path.stat().st_size)


def test_a_whole_output_has_no_problem(whole):
    assert verify(whole) == []


def test_a_missing_file_is_named_with_its_rows(whole):
    path = file_of(whole, "asr")
    path.unlink()
    assert verify(whole) == [f"asr/{path.name}: missing, with 6 rows"]


def test_a_file_that_was_cut_short_is_named_with_its_size(whole):
    path = file_of(whole, "asr")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert verify(whole) == [f"asr/{path.name}: {size - 1} bytes, but {size} were committed"]


def test_bytes_that_cannot_be_read_are_found(whole):
    """In a page's values: what lies in a footer's free text or decodes all the same is not found."""
    path = file_of(whole, "asr")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(each ^ 0xFF for each in content[4:60])
    path.write_bytes(content)
    [problem] = verify(whole)
    assert problem.startswith(f"asr/{path.name}: cannot be read (")


def test_files_that_no_log_names_are_found(whole):
    (whole.output / "asr" / "part-x.parquet").write_bytes(file_of(whole, "asr").read_bytes())
    (whole.output / "failures" / "part-y.parquet#1").write_bytes(b"half")
    assert sorted(verify(whole)) == [
        "asr/part-x.parquet: not in the table's log; the next run removes it, or `svbatch compact`",
        "failures/part-y.parquet#1: half written; the next run removes it, or `svbatch compact`",
    ]


def test_a_key_that_is_there_twice_is_found_in_every_table(whole):
    write_deltalake(whole.output / "asr", asr({"/a": "alpha"}), mode="append")
    write_deltalake(whole.output / "recordings", recordings({"/b": "beta"}), mode="append")
    write_deltalake(whole.output / "runs", run_row(recordings=0), mode="append")
    write_deltalake(whole.output / "failures", failures(("/bad", None, None, "again")), mode="append")
    assert verify(whole) == [
        "asr: 2 keys more than once, such as ('/a', None, 0.0)",
        "failures: 1 keys more than once, such as ('/bad', None, None, None, None, None)",
        "recordings: 1 keys more than once, such as ('/b',)",
        "runs: 1 keys more than once, such as ('r1',)",
    ] or verify(whole)[0].startswith("asr: 2 keys")


def test_rows_that_recordings_does_not_know_are_found(whole):
    write_deltalake(whole.output / "asr", asr({"/new": "new"}), mode="append")
    write_deltalake(whole.output / "failures", failures(("/new", "new", "asr", "cut")), mode="append")
    problems = verify(whole)
    assert [each.split(";")[0] for each in problems] == [
        "failures: rows of recordings that `recordings` does not list: /new",
        "asr: rows of recordings that `recordings` does not list: /new",
    ]


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (asr({"/cut": "other"}, "v2"), "rows of versions that `recordings` does not list as answered: /cut"),
        (asr({"/bad": "other"}, "v1"), "rows of other bytes than `recordings` has: /bad"),
    ],
)
def test_rows_of_another_version_or_of_other_bytes_are_found(whole, rows, problem):
    rows = rows.set_column(3, rows.schema.field("start"), pa.array([7.0, 8.0]))
    write_deltalake(whole.output / "asr", rows, mode="append")
    assert any(problem in each for each in verify(whole))


def test_an_answered_recording_without_rows_or_failures_is_found(whole):
    write_deltalake(whole.output / "recordings", recordings({"/lost": "lost"}), mode="append")
    [problem] = verify(whole)
    assert problem.startswith("asr: neither rows nor failures of recordings that were answered: /lost;")


def test_a_table_that_is_missing_is_found(whole):
    for table in ("asr", "runs"):
        (whole.output / table).rename(whole.output.parent / table)
    assert [each.split(":")[:2] for each in verify(whole)] == [
        ["runs", " the table is missing"],
        ["asr", " the table is missing, but it answered recordings"],
    ]


def test_a_run_whose_counts_do_not_add_up_is_found(whole):
    write_deltalake(whole.output / "runs", run_row(recordings=5, annotated=3, run_id="r2"), mode="append")
    assert verify(whole) == ["runs: r2 has 5 recordings, but 3 annotated + 0 empty + 0 failed + 0 unchanged"]


def test_a_forget_that_was_cut_off_is_found(whole):
    (whole.output / NOTE).write_text(json.dumps({"recording_ids": [], "uris": []}))
    assert verify(whole) == [f"{NOTE}: `forget` was cut off; the next run finishes it, or `svbatch compact`"]


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"commitInfo', b"{}"])
def test_a_damaged_last_log_entry_is_found_and_refused(whole, content):
    entry = max((whole.output / "asr" / "_delta_log").glob("*.json"))
    entry.write_bytes(content)
    assert any(f"{entry}: the last entry of the table's log is damaged" in each for each in verify(whole))


def test_an_output_in_use_is_busy_and_changes_nothing(whole):
    before = sorted((path, path.stat().st_mtime_ns) for path in whole.output.rglob("*"))
    with whole.lock(), pytest.raises(BusyError, match="is writing there; verify when it has ended"):
        verify(whole)
    assert verify(whole) == []
    assert sorted((path, path.stat().st_mtime_ns) for path in whole.output.rglob("*") if path.suffix != ".lock") == [
        each for each in before if each[0].suffix != ".lock"
    ]


def flipped(whole, times):
    """How many of so many flipped bits of a file are found. Each other still decodes to values that no check tells."""
    path = file_of(whole, "asr")
    content = path.read_bytes()
    chance = random.Random(0)
    found = 0
    for _ in range(times):
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
        found += bool(verify(whole))
    return found


def test_a_flipped_bit_is_no_crash(whole):
    assert flipped(whole, 12) > 1


@pytest.mark.slow
def test_how_many_flipped_bits_are_found(whole):
    found = flipped(whole, 500)
    print(f"{found} of 500 flipped bits are found")
    assert found > 100
