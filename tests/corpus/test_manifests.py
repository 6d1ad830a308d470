"""Each kind of manifest by example, and what is said of a wrong one."""

import gzip
import json
import os
from pathlib import Path

import pytest
from manifests import CUT, RECORDING, Row, csv_file, formats, json_lines, listed, parquet, rows_of, wrong

from svbatch.corpus.content import content_of
from svbatch.corpus.recording import LocalFile, Span
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError, RecordingError


@formats
def test_columns_say_path_span_reference_and_metadata(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.wav").write_bytes(b"four")
    row = {"path": "sub/b.wav", "start": 1.5, "end": 2, "text": "Hello, you", "speaker": "Ann", "age": 41}
    (recording,) = rows_of(tmp_path, name, row)
    assert recording.uri == f"{tmp_path}/sub/b.wav#t=1.5,2"
    assert recording.location == LocalFile(tmp_path / "sub/b.wav")
    assert recording.span == Span(1.5, 2.0)
    assert (recording.reference, recording.metadata) == ("Hello, you", {"speaker": "Ann", "age": "41"})
    assert recording.size_bytes == 4
    assert content_of(recording) == b"four"


@formats
@pytest.mark.parametrize(
    ("row", "span"),
    [
        ({"path": "a.wav"}, None),
        ({"path": "a.wav", "start": 0}, None),
        ({"path": "a.wav", "duration": 3.5}, None),
        ({"path": "a.wav", "start": 2}, Span(2.0)),
        ({"path": "a.wav", "end": 2}, Span(0.0, 2.0)),
        ({"path": "a.wav", "offset": 0.1, "duration": 0.2}, Span(0.1, 0.3)),
        ({"path": "a.wav", "start": 1, "end": 3, "duration": 2}, Span(1.0, 3.0)),
    ],
)
def test_a_span_needs_a_start_or_an_end(tmp_path: Path, name: str, row: Row, span: Span | None) -> None:
    (recording,) = rows_of(tmp_path, name, row)
    assert recording.span == span
    assert recording.uri == f"{tmp_path}/a.wav" + ("" if span is None else f"#t={span}")


def test_every_wrong_line_is_named_at_once(tmp_path: Path) -> None:
    lines = [
        '{"path": "a.wav"}',
        "{",
        "[]",
        '{"text": "a"}',
        "",
        '{"path": 7}',
        '{"path": "a.wav", "start": -1}',
        '{"path": "a.wav", "start": 2, "end": 2.0}',
        '{"path": "a.wav", "start": 2, "end": 4, "duration": 1}',
        '{"path": "a.wav", "start": "soon"}',
        '{"path": "a.wav", "start": true}',
        '{"path": "a.wav", "text": ["a"]}',
        '{"path": "a\\u0000.wav"}',
        '{"path": "a.wav", "text": "\\ud800"}',
    ]
    assert wrong(tmp_path / "a.jsonl", "\n".join(lines)) == [
        "line 2: is not a JSON object in UTF-8 (Expecting property name enclosed in double quotes)",
        "line 3: is not a JSON object; write one object per line",
        "line 4: names no recording; it wants one of path, uri, audio, audio_filepath",
        "line 6: `path` is 7, not text",
        "line 7: `start` is -1, not a number of seconds from 0",
        "line 8: ends at 2 s, not after its start at 2 s",
        "line 9: end 4 s is not start plus duration, 3 s; leave one of them out",
        "line 10: `start` is 'soon', not a number of seconds from 0",
        "line 11: `start` is True, not a number of seconds from 0",
        "line 12: `text` is ['a'], not text",
        "and 2 more such lines",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "line 1: has no column with the recordings, one of path, uri, audio, audio_filepath; found nothing"),
        (
            "file;text\na;b\n",
            'line 1: has no column with the recordings, one of path, uri, audio, audio_filepath; found "file;text"',
        ),
        ("path,a,a\n", 'line 1: names column "a" twice'),
        ("path,text\na.wav\n", "line 2: has 1 values for 2 columns"),
        ("path,text\na.wav,b,c\n", "line 2: has 3 values for 2 columns"),
        ('path\n"a.wav\n', "line 2: is not CSV (unexpected end of data)"),
        (b"path,text\na.wav,\xff\n", "line 2: `text` holds what is not UTF-8; write the manifest as UTF-8"),
    ],
)
def test_a_csv_that_is_wrong_is_refused_by_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    assert [line.replace("'text' holds", "`text` holds") for line in wrong(tmp_path / "a.csv", content)] == [expected]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"path\na.wav\n", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    (line,) = wrong(tmp_path / "a.parquet", content)
    assert line.startswith("row 1: cannot be read as Parquet (")


def test_parquet_types_are_metadata_as_text(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    row = {"path": "a.wav", "when": datetime(2026, 1, 2, tzinfo=UTC), "tags": ["a", "ü"], "yes": True, "none": None}
    (recording,) = rows_of(tmp_path, "a.parquet", row)
    assert recording.metadata == {"when": "2026-01-02 00:00:00.000000Z", "tags": '["a", "ü"]', "yes": "true"}
    parquet(tmp_path / "b.parquet", [{"path": "a.wav", "sound": b"\0\1"}])
    assert wrong(tmp_path / "b.parquet") == ["row 1: `sound` holds bytes, not text; leave the column out"]


def test_nemo_json_lines_are_read_whatever_their_suffix(tmp_path: Path) -> None:
    line = {"audio_filepath": "a.wav", "duration": 3.2, "offset": 1.0, "text": "yes", "lang": "en"}
    for name in ("a.json", "a.jsonl"):
        json_lines(tmp_path / name, [line])
        (recording,) = listed(tmp_path / name)
        assert recording.uri == f"{tmp_path}/a.wav#t=1,4.2"
        assert (recording.reference, recording.metadata) == ("yes", {"lang": "en"})


def kaldi(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(content)
    return folder


def test_a_kaldi_folder_without_segments_is_its_recordings(tmp_path: Path) -> None:
    kaldi(tmp_path, wav_scp="one sub/a b.wav\ntwo\tb.wav\n", text="one hello  you\ntwo\n", utt2spk="one Ann\n")
    for entry in (".", "wav.scp"):
        first, second = iter_recordings([entry], tmp_path)
        assert (first.uri, first.reference) == (f"{tmp_path}/sub/a b.wav", "hello  you")
        assert first.metadata == {"utterance": "one", "speaker": "Ann"}
        assert (second.uri, second.reference) == (f"{tmp_path}/b.wav", "")


def test_a_kaldi_folder_with_segments_is_its_segments(tmp_path: Path) -> None:
    kaldi(
        tmp_path, wav_scp="one a.wav\n", segments="u1 one 0.5 1.25\nu2 one 2 -1\n", text="u1 hi\n", utt2spk="u1 Ann\n"
    )
    first, second = iter_recordings(["."], tmp_path)
    assert (first.uri, first.reference) == (f"{tmp_path}/a.wav#t=0.5,1.25", "hi")
    assert first.metadata == {"utterance": "u1", "recording": "one", "speaker": "Ann"}
    assert (second.span, second.reference) == (Span(2.0), None)


def test_a_kaldi_folder_that_is_wrong_is_refused_by_line_and_no_command_is_run(tmp_path: Path) -> None:
    kaldi(
        tmp_path,
        wav_scp=f"one touch {tmp_path}/ran |\ntwo\nthree a.wav\nthree b.wav\n",
        segments="u1 one 0 1\nu2 three 2 1\nu3 three 1\nu4 three x 1\n",
        text="u1 \udcff\n".encode("utf-8", "surrogateescape").decode("latin-1"),
    )
    (tmp_path / "text").write_bytes(b"u1 \xff\n")
    with pytest.raises(CorpusError) as error:
        list(iter_recordings(["."], tmp_path))
    assert str(error.value).replace(f"{tmp_path}/", "").splitlines() == [
        "text, line 1: is not UTF-8",
        "wav.scp, line 1: is a command, and none is run; write its sound to a file, and name it",
        "wav.scp, line 2: wants a key, a space and a value",
        "wav.scp, line 4: names 'three' again",
        "segments, line 1: is of recording 'one', which is not in wav.scp",
        "segments, line 2: ends at 1 s, not after its start at 2 s",
        "segments, line 3: wants an utterance, a recording, a start and an end",
        "segments, line 4: `start` is 'x', not a number of seconds from 0",
    ]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lhotse_recordings_and_cuts(tmp_path: Path, name: str) -> None:
    content = "".join(json.dumps(line) + "\n" for line in (RECORDING, CUT, CUT | {"start": 0, "duration": 10.0}))
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    recording, cut = listed(tmp_path / name)  # the cut that is all of the recording has its uri, and is listed once
    assert (recording.uri, recording.metadata) == (f"{tmp_path}/a.wav", {"id": "call"})
    assert (cut.uri, cut.reference) == (f"{tmp_path}/a.wav#t=2,5.5", "hello you")
    assert cut.metadata == {
        "id": "call-1",
        "recording_id": "call",
        "speaker": "Bob, Ann",
        "language": "English",
        "snr": "12.5",
    }


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"type": "MixedCut"}, "is a MixedCut; only MonoCut is read: save the audio of such cuts and list the files"),
        ({"recording": None}, "is a cut without its recording; write the cuts with their recordings"),
        ({"start": None}, "`start` is None, not a number of seconds from 0"),
        ({"supervisions": [3]}, "`supervisions` is not a list of objects"),
        ({"supervisions": {}}, None),
        ({"supervisions": "a"}, "`supervisions` is not a list"),
        ({"custom": 3}, "`custom` is not an object"),
        (
            {"recording": RECORDING | {"transforms": [{}]}},
            "is to be transformed as it is read; save it so, and list the file",
        ),
        ({"recording": RECORDING | {"sources": []}}, "has 0 sources; only recordings of one are read"),
        (
            {"recording": RECORDING | {"sources": [{"type": "command", "channels": [0], "source": "rm -r /"}]}},
            "has a source of type 'command'; only `file` and `url` are read, and no command is run",
        ),
        (
            {"recording": RECORDING | {"sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}]}},
            "is a cut of one channel of several; split the channels into files of their own",
        ),
    ],
)
def test_a_cut_that_is_more_than_a_span_is_refused(tmp_path: Path, change: Row, why: str | None) -> None:
    json_lines(tmp_path / "a.jsonl", [CUT | change])
    if why is None:
        assert len(listed(tmp_path / "a.jsonl")) == 1
    else:
        assert wrong(tmp_path / "a.jsonl") == [f"line 1: {why}"]


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b'{"path": "a.wav"}\n' * 999, mtime=0)[:-20]])
def test_a_damaged_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    if not content:
        (tmp_path / "a.jsonl.gz").touch()
        with pytest.raises(CorpusError, match=r"no recording in 'a\.jsonl\.gz'"):
            listed(tmp_path / "a.jsonl.gz")
    else:
        assert "cannot be unzipped" in wrong(tmp_path / "a.jsonl.gz", content)[-1]


def test_a_manifest_that_is_a_fifo_or_not_to_be_read_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    assert wrong(tmp_path / "a.jsonl") == [f"corpus: {tmp_path}/a.jsonl is no file; remove it, or name another"]


def test_a_missing_file_of_a_manifest_is_a_recording_that_fails(tmp_path: Path) -> None:
    (recording,) = rows_of(tmp_path, "a.csv", {"path": "lost.wav"})
    with pytest.raises(RecordingError) as error:
        content_of(recording)
    assert (error.value.stage, error.value.code) == ("decode", "unreadable")


@pytest.mark.parametrize("path", ["../b.wav", "/etc/passwd", "sub/../../b.wav", "s3://bucket/a.wav"])
def test_a_manifest_does_not_leave_its_folder_unless_it_may(tmp_path: Path, path: str) -> None:
    (tmp_path / "in").mkdir()
    csv_file(tmp_path / "in/a.csv", [{"path": path}])
    assert wrong(tmp_path / "in/a.csv") == [
        f"line 2: '{path}' is not below the manifest's folder; if it is meant, set `follow_outside: true`"
    ]
    if "://" not in path:
        (recording,) = listed(tmp_path / "in/a.csv", follow_outside=True)
        assert recording.uri == os.path.abspath(tmp_path / "in" / path)


def test_an_absolute_path_below_the_manifests_folder_is_inside_by_whatever_name(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.wav").touch()
    (tmp_path / "name").symlink_to("real")
    for folder, other in (("real", "real"), ("real", "name"), ("name", "real")):
        csv_file(tmp_path / folder / "a.csv", [{"path": f"{tmp_path}/{other}/a.wav"}])
        assert len(listed(tmp_path / folder / "a.csv")) == 1


def test_a_link_in_a_manifest_that_leads_out_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.wav").write_bytes(b"four")
    (tmp_path / "in/a.wav").symlink_to(tmp_path / "out/a.wav")
    (tmp_path / "in/sub").symlink_to(tmp_path / "out")
    csv_file(tmp_path / "in/a.csv", [{"path": "a.wav"}, {"path": "sub/a.wav"}])
    for recording in listed(tmp_path / "in/a.csv"):
        with pytest.raises(RecordingError, match=r"leads out of .*/in'; set `follow_outside: true`") as error:
            content_of(recording)
        assert error.value.code == "outside"
    for recording in listed(tmp_path / "in/a.csv", follow_outside=True):
        assert content_of(recording) == b"four"


def test_a_glob_finds_manifests_only_by_their_suffix(tmp_path: Path) -> None:
    csv_file(tmp_path / "a.csv", [{"path": "x.wav"}])
    (tmp_path / "b.wav").touch()
    assert [r.uri for r in iter_recordings(["*"], tmp_path)] == [f"{tmp_path}/b.wav"]
    assert [r.uri for r in iter_recordings(["*.csv"], tmp_path)] == [f"{tmp_path}/x.wav"]
    assert [r.uri for r in iter_recordings(["."], tmp_path)] == [f"{tmp_path}/b.wav"]


def test_a_uri_of_a_table_names_its_recording_again(tmp_path: Path) -> None:
    (tmp_path / "a #1.wav").write_bytes(b"four")
    (first,) = rows_of(tmp_path, "a.jsonl", {"path": "a #1.wav", "start": 1, "end": 2})
    assert first.uri == f"{tmp_path}/a %231.wav#t=1,2"
    (again,) = rows_of(tmp_path, "b.jsonl".replace("b", "a"), {"uri": first.uri})
    assert (again.uri, again.location, again.span) == (first.uri, first.location, first.span)
    assert wrong(tmp_path / "a.jsonl", '{"uri": "a.wav#1"}')[0].startswith("line 1: after `#` wants t=START,END")
    assert "names a member of a tar" in wrong(tmp_path / "a.jsonl", '{"uri": "a.tar!/b.wav"}')[0]
