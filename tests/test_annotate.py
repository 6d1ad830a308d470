import math
import re
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest
import soundfile
import torch

from svbatch.annotate import Annotated, annotate
from svbatch.corpus.decode import decode
from svbatch.corpus.recording import Recording
from svbatch.corpus.recording import Span as CutOut
from svbatch.corpus.sources import iter_recordings, recording_at
from svbatch.hear import Span, hear
from svbatch.onnx import OnnxSession
from svbatch.tasks.task import load_task

TASKS = [
    load_task(entry, Path()) for entry in ("asr", {"keyword_search": {"keywords": ["rain", "a"]}}, "speech_activity")
]
VERSIONS = {task.name: f"version of {task.name}" for task in TASKS}
DOCS = Path(__file__).parents[1] / "docs" / "tasks.md"
UNEQUAL = ("annotated_at", "failed_at")


def answer(recordings: list[Recording], model, tasks=TASKS) -> Annotated:
    return annotate(recordings, tasks, {task.name: VERSIONS[task.name] for task in tasks}, model, "run")


def rows(annotated: Annotated, table: str, name: str | None = None) -> list[dict]:
    """The rows of one recording, or of all, without the times at which they were made."""
    tables = {**annotated.answers, "failures": annotated.failures, "recordings": annotated.recordings}
    listed = [{k: v for k, v in row.items() if k not in UNEQUAL} for row in tables[table].to_pylist()]
    return [row for row in listed if name is None or row["uri"].endswith(f"/{name}")]


def differences(left: object, right: object, place: str = "") -> list[str]:
    """Where two values differ, numbers by more than 1e-4."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [d for key in left for d in differences(left[key], right[key], f"{place}.{key}")]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        return [d for i in range(len(left)) for d in differences(left[i], right[i], f"{place}[{i}]")]
    if isinstance(left, float) and isinstance(right, float) and math.isclose(left, right, rel_tol=0, abs_tol=1e-4):
        return []
    return [] if left == right else [f"{place}: {left!r} and {right!r}"]


@pytest.fixture(scope="module")
def recordings(corpus_dir, tmp_path_factory) -> list[Recording]:
    """The four readable ones, and a text file named .wav."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.wav").write_text("no sound at all")
    return list(iter_recordings([str(corpus_dir), str(folder)], corpus_dir))


@pytest.fixture(scope="module")
def together(recordings, tiny_model) -> Annotated:
    return answer(recordings, tiny_model)


def test_every_row_is_the_same_alone_and_in_a_batch(recordings, together, tiny_model):
    compared = 0
    for recording in recordings:
        alone = answer([recording], tiny_model)
        for table in [*VERSIONS, "failures", "recordings"]:
            expected = rows(together, table, recording.uri.rsplit("/", 1)[-1])
            assert differences(expected, rows(alone, table)) == []
            compared += len(expected)
    assert compared >= len(recordings) + 10


@pytest.mark.slow
def test_every_row_of_mini_is_the_same_alone_and_in_a_batch(held_out_data, mini):
    folder = held_out_data / "dev"
    recordings = [r for i, r in enumerate(iter_recordings([str(folder)], folder)) if i % 15 == 0]
    together = answer(recordings, mini)
    compared = 0
    for recording in recordings:
        alone = answer([recording], mini)
        for table in [*VERSIONS, "recordings"]:
            expected = rows(together, table, recording.uri.rsplit("/", 1)[-1])
            assert differences(expected, rows(alone, table)) == []
            compared += len(expected)
    assert compared > 3 * len(recordings)


def test_rows_do_not_depend_on_what_else_is_asked(recordings, together, tiny_model):
    alone = answer(recordings, tiny_model, [task for task in TASKS if task.name == "speech_activity"])
    assert differences(rows(together, "speech_activity"), rows(alone, "speech_activity")) == []


def test_a_task_of_sound_alone_has_the_rows_that_it_has_beside_one_of_words(recordings, tiny_model, monkeypatch):
    """The recogniser has a say in whether a segment holds speech, also where nobody asks for words."""
    monkeypatch.setattr("svbatch.hear.SPARSE_EMBEDDINGS", 0.001)  # every read-out is sparse, so doubt decides
    emotion = load_task("emotion", Path())
    versions = {"emotion": "1", "asr": "2"}
    alone = annotate(recordings, [emotion], versions, tiny_model, "run")
    beside = annotate(recordings, [emotion, TASKS[0]], versions, tiny_model, "run")
    assert differences(rows(alone, "emotion"), rows(beside, "emotion")) == []
    assert alone.recordings["num_segments"] == beside.recordings["num_segments"]


def test_silence_has_a_row_of_speech_activity_and_none_of_asr(together):
    [row] = rows(together, "speech_activity", "silent.wav")
    assert (row["start"], row["end"]) == (0.0, 3.0)
    assert rows(together, "asr", "silent.wav") == []
    assert rows(together, "keyword_search", "silent.wav") == []
    [recording] = rows(together, "recordings", "silent.wav")
    assert (recording["status"], recording["num_segments"]) == ("empty", 0)


def test_times_are_seconds_of_the_source_file(together):
    """twice.wav is 2 s of sound, 4 s of silence and 2 s of sound, in stereo at 8 kHz."""
    first, second = rows(together, "asr", "twice.wav")
    assert first["start"] == pytest.approx(0.0, abs=0.05)
    assert first["end"] == pytest.approx(2.2, abs=0.05)
    assert second["start"] == pytest.approx(5.8, abs=0.05)
    assert second["end"] == pytest.approx(8.0, abs=0.05)
    for row in (first, second):
        times = [time for word in row["words"] for time in (word["start"], word["end"])]
        assert times == sorted(times)
        assert row["start"] <= times[0] <= times[-1] <= row["end"] + 0.08
    [recording] = rows(together, "recordings", "twice.wav")
    assert (recording["duration"], recording["sample_rate"], recording["channels"]) == (8.0, 8000, 2)
    assert (recording["status"], recording["num_segments"]) == ("annotated", 2)


def test_a_broken_file_is_a_failure_and_costs_no_other_row(recordings, together, tiny_model):
    whole = [recording for recording in recordings if not recording.uri.endswith("/broken.wav")]
    without = answer(whole, tiny_model)
    for table in VERSIONS:
        assert differences(rows(without, table), rows(together, table)) == []
    [failure] = rows(together, "failures")
    assert (failure["stage"], failure["task"], failure["recording_id"]) == ("decode", None, None)
    assert failure["uri"].endswith("/broken.wav")
    assert "broken.wav" in failure["message"]
    [recording] = rows(together, "recordings", "broken.wav")
    assert (recording["status"], recording["num_segments"], recording["duration"]) == ("failed", 0, None)


def test_probabilities_sum_to_one_and_the_temperature_is_the_bundles(together):
    for row in rows(together, "speech_activity"):
        assert sum(each["probability"] for each in row["probabilities"]) == pytest.approx(1.0)
        assert row["calibrated"]
    for row in rows(together, "keyword_search"):
        assert [k["keyword"] for k in row["keywords"]] == ["rain", "a"]
        assert not row["calibrated"]


def test_every_recording_is_listed_with_what_it_was_answered_for(recordings, together):
    listed = rows(together, "recordings")
    assert [row["uri"] for row in listed] == [recording.uri for recording in recordings]
    expected = [f"{name}@{version}" for name, version in VERSIONS.items()]
    assert all(row["answered"] == expected and row["run_id"] == "run" for row in listed)
    assert together.audio_seconds == pytest.approx(18.5 + 1.5 + 3.0 + 8.0)


def test_a_recording_that_is_only_asked_about_its_windows_is_not_called_empty(recordings, tiny_model):
    twice = [recording for recording in recordings if recording.uri.endswith("/twice.wav")]
    annotated = answer(twice, tiny_model, [task for task in TASKS if task.name == "speech_activity"])
    [row] = rows(annotated, "recordings")
    assert (row["status"], row["num_segments"]) == ("annotated", 2)


def test_a_task_that_needs_speech_is_asked_only_where_there_is_some(tmp_path, bursts, tiny_model):
    """The tiny read-out finds words in the sound and none in digital silence, which is one window."""
    soundfile.write(tmp_path / "sound.wav", bursts(3.0, seed=5), 16_000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(48_000, np.float32), 16_000)
    activity = load_task("speech_activity", Path())
    tasks = [activity, activity.model_copy(update={"name": "spoken", "needs_speech": True})]
    recordings = [recording_at(tmp_path / name) for name in ("sound.wav", "silence.wav")]
    with torch.inference_mode():
        spans = [Span(decode(recording).waveform, 0.0, transcribed=False) for recording in recordings]
        speaks = [bool(heard.has_speech) for heard in hear(spans, tiny_model)]
    answers = annotate(recordings, tasks, {"speech_activity": "1", "spoken": "2"}, tiny_model, "run").answers
    assert answers["speech_activity"].num_rows == 2
    assert answers["spoken"]["uri"].to_pylist() == sorted(
        recording.uri for recording, spoken in zip(recordings, speaks, strict=True) if spoken
    )


def test_where_the_detector_hears_nobody_there_are_windows_and_no_segment(
    recordings, together, tiny_model, detector_graph
):
    deaf = answer(recordings, replace(tiny_model, voice_activity=OnnxSession(detector_graph(bias=-50))))
    assert rows(deaf, "asr") == rows(deaf, "keyword_search") == []
    spans = {row["uri"]: [] for row in rows(deaf, "speech_activity")}
    for row in rows(deaf, "speech_activity"):
        spans[row["uri"]].append((row["start"], row["end"]))
    durations = {row["uri"]: row["duration"] for row in rows(together, "recordings") if row["duration"]}
    assert spans == {uri: [(0.0, duration)] for uri, duration in durations.items()}
    assert {row["status"] for row in rows(deaf, "recordings") if row["duration"]} == {"empty"}


def test_a_detector_that_hears_speech_in_all_sound_changes_no_row(recordings, together, tiny_model, detector_graph):
    keen = answer(recordings, replace(tiny_model, voice_activity=OnnxSession(detector_graph(bias=50))))
    for table in [*VERSIONS, "failures", "recordings"]:
        assert differences(rows(together, table), rows(keen, table)) == []


def test_a_transcript_of_a_recording_is_that_of_its_segments_as_a_query_has_it(recordings, together, tiny_model):
    """The query stands in docs/tasks.md."""
    task = load_task({"asr": {"scope": "recording", "name": "transcript"}}, Path())
    whole = annotate(recordings, [task], {"transcript": "1"}, tiny_model, "run").answers["transcript"].to_pylist()
    durations = {row["uri"]: row["duration"] for row in rows(together, "recordings")}
    assert [(row["start"], row["end"]) for row in whole] == [(0.0, durations[row["uri"]]) for row in whole]
    [query] = re.findall(r"```sql\n(.*?)```", DOCS.read_text(), re.DOTALL)
    segments = together.answers["asr"]  # read by DuckDB
    joined = duckdb.sql(query.replace("'out/asr/*.parquet'", "segments") + " ORDER BY uri").to_arrow_table().to_pylist()
    assert [{key: row[key] for key in ("uri", "text", "words")} for row in whole] == joined
    assert len(whole) == 3 < segments.num_rows
    assert all(row["words"] == sorted(row["words"], key=lambda word: word["start"]) for row in whole)


class SmallMemory:
    """An encoder session that cannot hold more than `most` windows at once."""

    def __init__(self, session, most: int) -> None:
        self._session, self._most = session, most

    def run(self, inputs):
        if len(inputs["waveform"]) > self._most:
            raise RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested buffer of size 9")
        return self._session.run(inputs)


def test_a_batch_that_does_not_fit_into_memory_is_halved_and_loses_nothing(recordings, tiny_model, caplog):
    small = replace(tiny_model, encoder=SmallMemory(tiny_model.encoder, 1))
    for table in ("asr", "keyword_search", "speech_activity", "recordings"):
        assert differences(rows(answer(recordings, small), table), rows(answer(recordings, tiny_model), table)) == []
    assert "do not fit into memory; going on with half of them" in caplog.text


def test_what_does_not_fit_alone_is_a_failure_and_not_the_end(recordings, tiny_model):
    annotated = answer(recordings, replace(tiny_model, encoder=SmallMemory(tiny_model.encoder, 0)))
    failed = [row for row in annotated.failures.to_pylist() if row["code"] == "out_of_memory"]
    assert {row["task"] for row in failed} == {task.name for task in TASKS}
    assert len(failed) == annotated.num_unanswered
    assert all(table.num_rows == 0 for table in annotated.answers.values())
    assert annotated.recordings.num_rows == len(recordings)


def test_another_error_is_a_bug_that_shows(recordings, tiny_model):
    class Broken:
        def run(self, inputs):
            raise RuntimeError("a wrong shape")

    with pytest.raises(RuntimeError, match="a wrong shape"):
        answer(recordings, replace(tiny_model, encoder=Broken()))


def test_what_a_manifest_says_is_in_the_table_recordings(corpus_dir, tmp_path, tiny_model):
    (tmp_path / "a.csv").write_text(f"path,start,text,speaker\n{corpus_dir}/short.flac,0.25,hello,Ann\n")
    recordings = list(iter_recordings(["a.csv"], tmp_path, follow_outside=True))
    (row,) = answer(recordings, tiny_model).recordings.to_pylist()
    assert row["uri"] == f"{corpus_dir}/short.flac#t=0.25"
    assert (row["span_start"], row["span_end"], row["reference"]) == (0.25, None, "hello")
    assert row["metadata"] == [{"name": "speaker", "value": "Ann"}]


def test_each_channel_has_rows_of_its_own(corpus_dir, tiny_model):
    """twice.wav holds the same sound in both channels."""
    whole = load_task("emotion", Path()).model_copy(update={"scope": "recording"})
    tasks, versions = [*TASKS, whole], {**VERSIONS, whole.name: "1"}
    recording = recording_at(corpus_dir / "twice.wav")
    each = annotate([recording], tasks, versions, tiny_model, "run", decoded=iter([decode(recording, "each")]))
    mixed = annotate([recording], tasks, versions, tiny_model, "run")
    for table in versions:
        expected = rows(mixed, table)
        assert {row["channel"] for row in expected} == {None}
        for channel in (0, 1):
            own = [row | {"channel": None} for row in rows(each, table) if row["channel"] == channel]
            assert differences(expected, own) == []
    assert [row["channel"] for row in rows(each, whole.name)] == [0, 1]
    [listed] = rows(each, "recordings")
    assert (listed["channels"], listed["num_segments"]) == (2, 4)


def test_a_spans_times_are_seconds_of_its_source(corpus_dir, tiny_model):
    """The second sound of twice.wav lies from 6 to 8 s."""
    recording = recording_at(corpus_dir / "twice.wav")
    part = replace(recording, uri=f"{recording.uri}#t=3,8", span=CutOut(3.0, 8.0))
    annotated = answer([part], tiny_model)
    [row] = rows(annotated, "asr")
    assert row["start"] == pytest.approx(5.8, abs=0.25)
    assert row["end"] == pytest.approx(8.0, abs=0.05)
    times = [time for word in row["words"] for time in (word["start"], word["end"])]
    assert row["start"] <= times[0] <= times[-1] <= row["end"] + 0.08
    assert {(r["start"], r["end"]) for r in rows(annotated, "speech_activity")} >= {(row["start"], row["end"])}
    [listed] = rows(annotated, "recordings")
    assert (listed["duration"], listed["span_start"], listed["span_end"]) == (5.0, 3.0, 8.0)


def test_samples_are_let_go_when_they_have_been_heard_and_rows_stay_the_same(
    recordings, together, tiny_model, monkeypatch
):
    monkeypatch.setattr("svbatch.annotate.MAX_SOUND_BYTES", 1)  # one recording at a time
    alone = answer(recordings, tiny_model)
    for table in [*VERSIONS, "failures", "recordings"]:
        assert differences(rows(together, table), rows(alone, table)) == []
