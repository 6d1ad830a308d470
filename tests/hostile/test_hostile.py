"""Broken inputs of every kind: no crash, no hang, each accounted for, and no good recording's row the worse."""

import math
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from changing import Changing
from generate import FORMATS, Hostile, encoded, generate

from svbatch.corpus.decode import Audio, decode
from svbatch.corpus.sources import iter_recordings, recording_at
from svbatch.corpus.worker import Limits
from svbatch.corpus.workers import decoding
from svbatch.errors import RecordingError
from svbatch.scan import scan
from svbatch.tables.store import Store
from svbatch.tables.verify import verify

SEED = 20_261_125
SAMPLE = 60
MAX_WORKER_BYTES = 2**30
MAX_BYTES = 4 * 2**30  # of the run itself: torch, the tiny model, a batch, and 12 hours of a bomb (2.8 GB)
UNEQUAL = ("uri", "run_id", "annotated_at", "failed_at", "modified_at")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Hostile:
    """Without the bombs, which take a while to write."""
    return generate(tmp_path_factory.mktemp("hostile") / "corpus", SEED, bombs=False)


def test_the_generator_makes_the_same_500_each_time(hostile, tmp_path):
    again = generate(tmp_path / "corpus", SEED, bombs=False)
    assert len(hostile.broken) >= 500
    assert [path.name for path in again.broken] == [path.name for path in hostile.broken]
    plain = [path for path in hostile.broken if path.is_file() and not path.is_symlink()]
    assert len(plain) > 490
    differing = [path.name for path in plain if (again.broken[0].parent / path.name).read_bytes() != path.read_bytes()]
    # Ogg and Matroska draw a number for each stream; a WAV of floats tells the time at which it was written.
    assert [
        name
        for name in differing
        if not name.endswith(("ogg", "opus", "webm", "mkv", "mka", "float.wav", "double.wav"))
    ] == []


def test_a_sample_is_scanned_and_each_is_accounted_for(hostile, tmp_path):
    random = np.random.default_rng(SEED)
    picked = [hostile.broken[i] for i in sorted(random.choice(len(hostile.broken), SAMPLE, replace=False))]
    corpus = [str(path) for path in (*hostile.good, *picked)]
    listed = [recording.uri for recording in iter_recordings(corpus, tmp_path)]
    found = scan(corpus, tmp_path, tmp_path / "scan.parquet", quiet=True)
    assert found.readable + found.unreadable == len(listed)
    assert found.readable >= len(hostile.good)
    assert not {"crashed", "timed_out", "out_of_memory"} & set(found.codes)


def test_good_recordings_are_decoded_as_without_the_broken_ones(hostile):
    recordings = list(iter_recordings([str(hostile.broken[0].parent), str(hostile.good[0].parent)], Path("/")))
    with decoding(recordings, "mix", num_workers=2, limits=Limits(silence_s=30)) as decoded:
        found = dict(zip((recording.uri for recording in recordings), decoded, strict=True))
    for path in hostile.good:
        audio = found[str(path)]
        assert isinstance(audio, Audio)
        np.testing.assert_array_equal(audio.waveform, decode(recording_at(path)).waveform)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_cut_recording_is_never_a_shorter_one(tmp_path, suffix):
    """Where its format tells: see docs/decode.md for those that do not."""
    whole = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    for part in range(1, 20):
        path.write_bytes(whole[: len(whole) * part // 20])
        with pytest.raises(RecordingError) as error:
            decode(recording_at(path))
        assert error.value.code in ("truncated", "no_audio", "empty", "unsupported")


def test_files_that_vanish_or_change_between_listing_and_reading_are_failures(tmp_path):
    for name in ("gone", "grown", "rewritten", "now-a-folder", "kept"):
        (tmp_path / f"{name}.wav").write_bytes(encoded("wav"))
    recordings = list(iter_recordings(["."], tmp_path))
    (tmp_path / "gone.wav").unlink()
    with (tmp_path / "grown.wav").open("ab") as file:
        file.write(b"more")
    (tmp_path / "rewritten.wav").write_bytes(encoded("wav", seed=1))
    os.utime(tmp_path / "rewritten.wav", ns=(0, 0))
    (tmp_path / "now-a-folder.wav").unlink()
    (tmp_path / "now-a-folder.wav").mkdir()
    with decoding(recordings, "mix", num_workers=1) as decoded:
        codes = {
            recording.location.path.stem: each.code if isinstance(each, RecordingError) else None
            for recording, each in zip(recordings, decoded, strict=True)
        }
    assert codes == {
        "gone": "unreadable",
        "grown": "changed",
        "rewritten": "changed",
        "now-a-folder": "unreadable",
        "kept": None,
    }


@pytest.mark.slow
def test_a_run_over_all_of_it_loses_nothing(tiny_bundle, tmp_path):
    made = generate(tmp_path / "hostile", SEED)
    changing = Changing(tmp_path / "changing", SEED)
    good, everything = tmp_path / "good.yaml", tmp_path / "all.yaml"
    for path, corpus in ((good, "hostile/good/"), (everything, "[hostile/, changing/all.csv]")):
        path.write_text(
            f"corpus: {corpus}\ntasks: [asr, {{keyword_search: {{keywords: [rain, a]}}}}, speech_activity]\n"
            f"output: {path.stem}-out/\nbundle: {tiny_bundle.folder}\nprecision: float32\ndevice: cpu\n"
        )
    assert _run(good, tiny_bundle.cache)[0] == 0
    with changing.while_changing():
        code, peaks, seconds = _run(everything, tiny_bundle.cache)
    assert code == 3
    store = Store(tmp_path / "all-out")
    recordings = {row["uri"]: row for row in store.read("recordings").to_pylist()}
    failures = store.read("failures").to_pylist()
    listed = {recording.uri for recording in iter_recordings(["hostile/", "changing/all.csv"], tmp_path)}
    assert set(recordings) == listed
    assert len(listed) >= len(made.broken) + len(made.good) - 1 + len(changing.paths)  # a link to a folder is none
    failed = {row["uri"] for row in failures if row["task"] is None}
    for uri, row in recordings.items():
        assert (row["status"] == "failed") == (uri in failed)
        assert row["status"] in ("annotated", "empty", "failed")
    codes = sorted({row["code"] for row in failures})
    assert not {"crashed", "timed_out"} & set(codes)
    bombs = sorted((Path(row["uri"]).name, row["code"]) for row in failures if "/bombs-" in row["uri"])
    assert [code for name, code in bombs if "liar" not in name] == ["too_long"] * 4
    assert [code for name, code in bombs if "liar" in name] == ["no_audio"]
    alone = Store(tmp_path / "good-out")
    for table in ("asr", "keyword_search", "speech_activity", "recordings"):
        expected, found = _rows(alone, table), _rows(store, table)
        assert expected
        assert differences(expected, found) == []
    statuses = [row["status"] for row in recordings.values()]
    counted = {status: statuses.count(status) for status in sorted(set(statuses))}
    mib = {name: peak // 2**20 for name, peak in peaks.items()}
    print(f"{len(listed)} recordings in {seconds:.0f} s: {counted}; failures {codes}; peak MiB {mib}")
    assert peaks["worker"] < MAX_WORKER_BYTES
    assert peaks["run"] < MAX_BYTES
    check_changing(changing, store)
    changing.restore()
    assert _run(everything, tiny_bundle.cache)[0] == 0
    now = {row["uri"]: row for row in store.read("recordings").to_pylist()}
    assert set(now) == listed
    for path in changing.paths:
        assert now[str(path)]["recording_id"] == changing.first_id(path)
        assert now[str(path)]["status"] in ("annotated", "empty")
    assert verify(store) == []


def check_changing(changing: Changing, store: Store) -> None:
    """Each is a failure, or a recording as it once was, with rows of just these bytes."""
    recordings = {row["uri"]: row for row in store.read("recordings").to_pylist()}
    failures = {row["uri"]: row["code"] for row in store.read("failures").to_pylist() if row["task"] is None}
    heard = {(row["uri"], row["recording_id"]) for row in store.read("asr").to_pylist()}
    codes = Counter(failures.get(str(path), recordings[str(path)]["status"]) for path in changing.paths)
    print(f"{changing.num_changes} changes of {len(changing.paths)} files while they were read: {dict(codes)}")
    assert codes["changed"] > 0
    for path in changing.paths:
        row = recordings[str(path)]
        assert (row["status"] == "failed") == (str(path) in failures)
        if row["status"] != "failed":
            assert row["recording_id"] in changing.states[path]
        of_path = {digest for uri, digest in heard if uri == str(path)}
        assert of_path == ({row["recording_id"]} if row["status"] == "annotated" else set())


def _run(job: Path, cache: Path) -> tuple[int, dict[str, int], float]:
    """Exit code, the most memory that the run and that one of its workers held, and seconds."""
    start = time.monotonic()
    line = [sys.executable, "-m", "svbatch", "run", str(job), "--quiet", "--cache", str(cache)]
    peaks = {"run": 0, "worker": 0}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            assert time.monotonic() - start < 1800, "it hangs"
            with suppress(psutil.Error):  # it has just ended
                itself = psutil.Process(process.pid)
                peaks["run"] = max(peaks["run"], itself.memory_info().rss)
                for child in itself.children():
                    peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
            time.sleep(0.05)
        said, _ = process.communicate()
    assert process.returncode in (0, 3), said
    return process.returncode, peaks, time.monotonic() - start


def _rows(store: Store, table: str) -> list[dict]:
    """Those of the good recordings, without what differs between two runs."""
    rows = sorted(store.read(table).to_pylist(), key=lambda row: (row["uri"], row.get("start") or 0.0))
    kept = [row for row in rows if "/good/" in row["uri"]]
    return [{k: v for k, v in row.items() if k not in UNEQUAL} for row in kept]


def differences(left: object, right: object, place: str = "") -> list[str]:
    """Where two values differ, numbers by more than 1e-4."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [d for i in range(len(left)) for d in differences(left[i], right[i], f"{place}[{i}]")]
    if isinstance(left, float) and isinstance(right, float) and math.isclose(left, right, rel_tol=0, abs_tol=1e-4):
        return []
    return [] if left == right else [f"{place}: {left!r} and {right!r}"]
