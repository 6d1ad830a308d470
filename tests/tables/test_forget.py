import re
from pathlib import Path

import pyarrow.parquet as pq
from batches import WHEN, asr, commit, failures, recordings, sha256
from deltalake import DeltaTable

from svbatch.tables.forget import forget
from svbatch.tables.schemas import table_of

SECRET = ["unspeakable", "/private", "unmentionable", "whispered", "surname"]


def run_row(job="job.yaml"):
    counts = dict.fromkeys(["recordings", "annotated", "unchanged", "empty", "failed"], 0)
    row = {"run_id": "run", "started_at": WHEN, "ended_at": WHEN, "job": job, "bundle": "b", "device": None}
    row |= {"precision": None, "audio_seconds": 0.0, "exit_code": 0, "version": "0"}
    return table_of("runs", [row | counts])


def fill(store):
    """Other recordings, and one whose words, uri, reference and metadata are secret; with a history."""
    for number in range(3):
        commit(store, {f"/other/{number}": f"other {number}"})
    rows = recordings({"/private/it's": "unspeakable"}).to_pylist()
    rows[0] |= {"reference": "whispered", "metadata": [{"name": "name", "value": "surname"}]}
    for version in ("v1", "v2"):
        commit(store, {"/other/a": "beta", "/private/it's": "unspeakable"}, version)
        store.commit(
            {"asr": asr({"/private/it's": "unspeakable"}, version)},
            failures(("/private/it's", "unspeakable", "asr", "unmentionable")),
            table_of("recordings", rows),
        )
    other = failures(("/other/a", "beta", "other", "cut")).to_pylist()
    other[0]["message"] = "longer than /private/it's, and than /private/it's.flac"
    store.commit({"other": asr({})}, table_of("failures", other), recordings({"/other/a": "beta"}))
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
            found.append(repr([file.read().to_pylist(), file.metadata.to_dict(), footer]).encode())
    return b"\n".join(found)


def test_no_byte_of_a_forgotten_recording_is_left(store):
    fill(store)
    before = bytes_of(store.output)
    assert [word for word in SECRET if word.encode() not in before] == []
    found = forget(store.tables, ["/private/it's"])
    assert (found.uris, found.recording_ids) == ({"/private/it's"}, {sha256("unspeakable")})
    left = bytes_of(store.output)
    assert [word for word in SECRET if word.encode() in left] == ["/private"]
    assert set(re.findall(rb"/private\S*", left)) == {b"/private/it's.flac\"}]"} or b"/private/it's.flac" in left
    assert b"/private/it's" not in left.replace(b"/private/it's.flac", b"")
