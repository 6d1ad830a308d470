from pathlib import Path

import pyarrow.parquet as pq
import pytest
from batches import WHEN, asr, commit, expected, failures, files_of, recordings, sha256, snapshot, texts
from deltalake import DeltaTable

from svbatch.errors import OutputError
from svbatch.tables.forget import NOTE, forget, unforget
from svbatch.tables.schemas import table_of

SECRET = ["unspeakable", "/private/it's", "unmentionable", "whispered", "surname"]


def run_row(job="job.yaml"):
    counts = dict.fromkeys(["recordings", "annotated", "unchanged", "empty", "failed"], 0)
    row = {"run_id": "run", "started_at": WHEN, "ended_at": WHEN, "job": job, "bundle": "b", "device": None}
    row |= {"precision": None, "audio_seconds": 0.0, "exit_code": 0, "version": "0"}
    return table_of("runs", [row | counts])


def fill(store):
    """Other recordings, and one whose words, uri, reference and metadata are secret; with a history."""
    for number in range(3):
        commit(store, {f"/other/{number}": f"other {number}"})
    for version in ("v1", "v2"):
        rows = recordings({"/private/it's": "unspeakable"}, version).to_pylist()
        rows[0] |= {"reference": "whispered", "metadata": [{"name": "name", "value": "surname"}]}
        commit(store, {"/other/a": "beta", "/private/it's": "unspeakable"}, version)
        store.commit(
            {"asr": asr({"/private/it's": "unspeakable"}, version)},
            failures(("/private/it's", "unspeakable", "asr", "unmentionable")),
            table_of("recordings", rows),
        )
    other = failures(("/other/a", "beta", "other", "cut")).to_pylist()
    other[0]["message"] = "longer than /private/it's. Not /private/its.flac"
    store.commit({"other": asr({})}, table_of("failures", other), recordings({"/other/a": "beta"}, "v2"))
    store.append_run(run_row("/private/it's"))
    store.tidy()
    DeltaTable(store.output / "asr").create_checkpoint()


def bytes_of(output: Path) -> bytes:
    """All bytes under a folder: raw, and of every Parquet file also its values and footer as text."""
    found = []
    for path in sorted(each for each in output.rglob("*") if each.is_file()):
        found += [str(path).encode(), path.read_bytes()]
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            footer = [file.metadata.row_group(group).to_dict() for group in range(file.num_row_groups)]
            found.append(str([file.read().to_pylist(), file.metadata.to_dict(), footer]).replace("\\", "").encode())
    return b"\n".join(found)


def secrets_in(output):
    held = bytes_of(output)
    return [word for word in SECRET if word.encode() in held]


@pytest.mark.parametrize("name", ["/private/it's", sha256("unspeakable")])
def test_no_byte_of_a_forgotten_recording_is_left(store, name):
    fill(store)
    assert secrets_in(store.output) == SECRET
    found = forget(store.tables, [name])
    assert (found.uris, found.recording_ids) == ({"/private/it's"}, {sha256("unspeakable")})
    assert secrets_in(store.output) == []
    [failure] = store.read("failures").to_pylist()
    assert failure["message"] == "longer than (forgotten). Not /private/its.flac"
    assert store.read("runs")["job"].to_pylist() == ["(forgotten)"]


def test_all_that_is_not_forgotten_stays_whole(store):
    fill(store)
    forget(store.tables, ["/private/it's"])
    files = {"/other/a": "beta"} | {f"/other/{number}": f"other {number}" for number in range(3)}
    assert texts(store) == expected(files)
    assert sorted(store.recordings()["uri"].to_pylist()) == sorted(files)
    for table in store.tables.names():
        assert files_of(store, table) == snapshot(store, table)
    commit(store, {"/other/a": "changed"})
    assert texts(store) == expected(files | {"/other/a": "changed"})


def test_a_tombstone_is_a_hash_and_a_time_and_can_be_lifted(store):
    fill(store)
    assert store.forgotten() == frozenset()
    forget(store.tables, ["/private/it's", "/other/0"])
    both = {sha256("unspeakable"), sha256("other 0")}
    assert store.forgotten() == both
    assert store.read("forgotten").column_names == ["recording_id", "forgotten_at"]
    unforget(store.tables, [sha256("other 0")])
    assert store.forgotten() == {sha256("unspeakable")}
    with pytest.raises(OutputError, match=f"not forgotten: {sha256('other 0')}"):
        unforget(store.tables, [sha256("other 0")])


def test_the_same_bytes_under_another_uri_are_forgotten_too(store):
    commit(store, {"/a": "same", "/copy": "same", "/b": "beta"})
    assert forget(store.tables, ["/a"]).uris == {"/a", "/copy"}
    assert texts(store) == expected({"/b": "beta"})


def test_a_source_is_forgotten_with_all_its_spans(store):
    commit(store, {"/a#t=0,1": "same", "/a#t=1,2": "same", "/ab": "beta"})
    assert forget(store.tables, ["/a"]).uris == {"/a#t=0,1", "/a#t=1,2"}
    assert texts(store) == expected({"/ab": "beta"})


def test_a_recording_that_was_never_read_is_forgotten_without_a_tombstone(store):
    commit(store, {"/a": None, "/b": None}, failed=[(uri, None, None, "unreadable") for uri in ("/a", "/b")])
    found = forget(store.tables, ["/a"])
    assert (found.uris, found.recording_ids) == ({"/a"}, frozenset())
    assert store.read("failures")["uri"].to_pylist() == ["/b"]
    assert store.recordings()["uri"].to_pylist() == ["/b"]
    assert store.forgotten() == frozenset()


def test_what_a_killed_run_left_of_it_is_forgotten_too(store):
    """Rows of answers, but no row of recordings yet."""
    store.tables.append("asr", asr({"/a": "alpha"}))
    forget(store.tables, ["/a"])
    assert texts(store) == []


def test_an_unknown_name_is_an_error_and_nothing_is_forgotten(store):
    commit(store, {"/a": "alpha"})
    with pytest.raises(OutputError, match=r"no recording is known as '/b', '/c'$"):
        forget(store.tables, ["/a", "/c", "/b"])
    assert texts(store) == expected({"/a": "alpha"})


def test_a_forget_that_was_cut_off_is_finished_by_the_next_run(store):
    fill(store)
    store.tables.folder.write(
        NOTE, f'{{"recording_ids": ["{sha256("unspeakable")}"], "uris": ["/private/it\'s"]}}'.encode()
    )
    (store.output / f"{NOTE}#1").write_text("/private/it's")
    store.tidy()
    assert secrets_in(store.output) == []
    assert store.forgotten() == {sha256("unspeakable")}
    assert not (store.output / NOTE).exists()
