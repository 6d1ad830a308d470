import hashlib
import json
import random
import shutil
import subprocess
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import asr, commit, failures, recordings
from deltalake import convert_to_deltalake, write_deltalake

from svbatch.errors import BusyError
from svbatch.tables.compact import compact
from svbatch.tables.delta import DESCRIPTION
from svbatch.tables.folder import Folder
from svbatch.tables.forget import NOTE, forget
from svbatch.tables.migrate import migrate
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import Store
from svbatch.tables.verify import files_without_hash, verify


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


def hashes_of(store):
    """Names of the files whose hash is kept, and of those of the tables."""
    kept = store.output.glob("_hashes/*/*")
    return {str(path.relative_to(store.output / "_hashes")) for path in kept}, {
        f"{table}/{name}.sha256" for table in store.tables.names() for name in store.tables.files(table)
    }


def remove_hashes(store):
    for path in store.output.glob("_hashes/*/*"):
        path.unlink()


def test_a_changed_byte_that_still_decodes_is_found(whole):
    """An uncompressed page, so that a changed letter of a transcript is a transcript like another."""
    path = file_of(whole, "asr")
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False)
    shutil.rmtree(whole.output / "asr" / "_delta_log")
    convert_to_deltalake(whole.output / "asr", description=DESCRIPTION)
    with whole.lock():
        remove_hashes(whole)
        whole.tidy()
    assert verify(whole) == []
    content = path.read_bytes()
    path.write_bytes(content.replace(b"beta", b"bets"))
    assert "bets" in whole.read("asr")["text"].to_pylist()
    [problem] = verify(whole)
    digests = [hashlib.sha256(each).hexdigest() for each in (path.read_bytes(), content)]
    said = "other bytes than were committed (SHA-256 {}, committed {}); put it back from a backup"
    assert problem == f"asr/{path.name}: {said.format(*digests)}"


def test_bytes_that_cannot_be_read_are_found_also_where_no_hash_is_kept(whole):
    remove_hashes(whole)
    path = file_of(whole, "asr")
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(each ^ 0xFF for each in content[4:60])
    path.write_bytes(content)
    [problem] = verify(whole)
    assert problem.startswith(f"asr/{path.name}: cannot be read (")


def test_just_the_files_of_the_tables_have_hashes_after_each_command(whole):
    with whole.lock():
        for command in (
            lambda: commit(whole, {"/a": "again", "/d": "delta"}),
            whole.tidy,
            lambda: compact(whole),
            lambda: forget(whole.tables, ["/b"]),
            lambda: migrate(whole, {"asr": arrow_schema("asr").remove(5)}),
        ):
            command()
            kept, held = hashes_of(whole)
            assert kept >= held
            if command is not whole.tidy:
                whole.tidy()
            kept, held = hashes_of(whole)
            assert kept == held
            assert files_without_hash(whole) == 0
    assert verify(whole) == []
    listed = b"".join(path.read_bytes() for path in whole.output.glob("_hashes/*/*"))
    subprocess.run(["sha256sum", "-c", "--quiet"], input=listed, cwd=whole.output, check=True)


def test_a_hash_that_a_kill_has_prevented_is_no_damage_and_kept_by_the_next_run(whole):
    remove_hashes(whole)
    (whole.output / "_hashes" / "asr" / "part-x.parquet.sha256#1").write_bytes(b"half")
    assert verify(whole) == []
    assert files_without_hash(whole) == len(hashes_of(whole)[1])
    with whole.lock(shard="1/2"):
        whole.tidy()
    assert files_without_hash(whole) > 0
    with whole.lock():
        whole.tidy()
    kept, held = hashes_of(whole)
    assert kept == held
    assert verify(whole) == []


def test_a_table_that_its_owner_has_removed_leaves_no_hash(whole):
    with whole.lock():
        [moved] = migrate(whole, {"asr": arrow_schema("asr").remove(5)})
        shutil.rmtree(whole.output / moved.aside)
        whole.tidy()
    kept, held = hashes_of(whole)
    assert kept == held


def test_a_file_that_is_lost_gets_no_hash_and_does_not_stop_the_next_run(whole):
    remove_hashes(whole)
    path = file_of(whole, "asr")
    path.unlink()
    with whole.lock():
        whole.tidy()
    assert verify(whole) == [f"asr/{path.name}: missing, with 6 rows"]


def test_hashes_that_are_kept_are_not_computed_again(whole, monkeypatch):
    """A run in which nothing is new reads no file of a task's table."""
    monkeypatch.setattr(Folder, "sha256", lambda *_: pytest.fail("a file is read"))
    with whole.lock():
        whole.prepare({"asr": arrow_schema("asr")})
        whole.tidy()


@pytest.mark.parametrize("content", [b"", b"garbage", b"0" * 64 + b"  asr/other.parquet\n"])
def test_a_damaged_record_of_a_hash_is_named(whole, content):
    name = f"{file_of(whole, 'asr').name}"
    record = whole.output / "_hashes" / "asr" / f"{name}.sha256"
    record.write_bytes(content)
    said = f"the record of its hash, _hashes/asr/{name}.sha256, is damaged; remove that, and the next run writes it"
    assert verify(whole) == [f"asr/{name}: {said}"]


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
    """How many of so many flipped bits of a file are found."""
    path = file_of(whole, "asr")
    content = path.read_bytes()
    chance = random.Random(0)
    found = 0
    for _ in range(times):
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :])
        found += bool(verify(whole))
    return found


def test_each_flipped_bit_is_found(whole):
    assert flipped(whole, 25) == 25


def test_a_flipped_bit_is_no_crash_where_no_hash_is_kept(whole):
    remove_hashes(whole)
    assert flipped(whole, 12) > 1
