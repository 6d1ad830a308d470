import os
import pickle
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from svbatch.corpus.content import MAX_BYTES, content_of
from svbatch.corpus.recording import EPOCH, LocalFile, Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError, RecordingError


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """b.wav, sub/a.FLAC, and what is not a recording."""
    folder = tmp_path / "calls"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b.wav", "sub/a.FLAC", "notes.txt", ".b.wav", ".hidden/c.wav"):
        (folder / name).write_bytes(b"four")
    return folder


def names(corpus: list[str], base: Path) -> list[str]:
    return [recording.uri.removeprefix(f"{base}/") for recording in iter_recordings(corpus, base)]


def test_a_folder_is_searched_for_audio_in_the_order_of_names(calls: Path) -> None:
    assert names(["calls"], calls.parent) == ["calls/b.wav", "calls/sub/a.FLAC"]


def test_a_recording_carries_its_uri_size_and_time_to_the_microsecond(calls: Path) -> None:
    os.utime(calls / "b.wav", ns=(0, 1_700_000_000_123_456_789))
    assert list(iter_recordings(["b.wav"], calls)) == [
        Recording(
            uri=f"{calls}/b.wav",
            location=LocalFile(calls / "b.wav"),
            size_bytes=4,
            modified_at=datetime(2023, 11, 14, 22, 13, 20, 123456, tzinfo=UTC),
        )
    ]


def test_a_file_named_in_the_corpus_needs_no_audio_suffix(calls: Path) -> None:
    assert names(["notes.txt"], calls) == ["notes.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["b.wav", "sub/a.FLAC"]),
        ("s*", ["sub/a.FLAC"]),
        ("**/*.FLAC", ["sub/a.FLAC"]),
        ("[ab].wav", ["b.wav"]),
    ],
)
def test_a_glob_matches_folders_and_audio_files(calls: Path, pattern: str, expected: list[str]) -> None:
    assert names([pattern], calls) == expected


def test_glob_characters_in_the_base_are_letters(tmp_path: Path) -> None:
    base = tmp_path / "[2024]"
    base.mkdir()
    (base / "a.wav").touch()
    assert names(["*.wav"], base) == ["a.wav"]


def test_an_existing_path_with_glob_characters_is_itself(tmp_path: Path) -> None:
    for name in ("a[1].wav", "a1.wav"):
        (tmp_path / name).touch()
    assert names(["a[1].wav"], tmp_path) == ["a[1].wav"]


def test_a_recording_named_by_several_entries_is_listed_once(calls: Path) -> None:
    assert names(["sub", ".", "*.wav", "sub/../b.wav", str(calls)], calls) == ["sub/a.FLAC", "b.wav"]


def test_a_link_to_a_folder_is_followed_and_a_loop_is_not(calls: Path) -> None:
    (calls / "sub" / "loop").symlink_to(calls)
    (calls / "today").symlink_to("sub")
    assert names(["."], calls) == ["b.wav", "sub/a.FLAC", "today/a.FLAC"]


@pytest.mark.parametrize("entry", ["linked", "linked/*"])
def test_a_link_that_leads_out_is_a_failure_unless_it_may(calls: Path, tmp_path: Path, entry: str) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "calls").symlink_to(calls)
    (tmp_path / "linked" / "b.wav").symlink_to(calls / "b.wav")
    for recording in iter_recordings([entry], tmp_path):
        with pytest.raises(RecordingError) as error:
            content_of(recording)
        assert error.value.code == "outside"
        assert str(error.value) == (
            f"{recording.uri} leads out of '{tmp_path}/linked'; set `follow_outside: true` in the job to follow it"
        )
    assert names([entry], tmp_path) == ["linked/b.wav", "linked/calls"]
    followed = iter_recordings([entry], tmp_path, follow_outside=True)
    assert [recording.uri.removeprefix(f"{tmp_path}/linked/") for recording in followed] == [
        "b.wav",
        "calls/b.wav",
        "calls/sub/a.FLAC",
    ]


def test_every_missing_entry_is_named(calls: Path) -> None:
    with pytest.raises(CorpusError) as error:
        list(iter_recordings(["sub", "lost", "*.mp3"], calls))
    assert str(error.value) == (
        f"corpus: nothing is at 'lost', '*.mp3' in {calls}; correct the path, or remove the entry"
    )


def test_a_corpus_without_audio_is_an_error_that_tells_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CorpusError) as error:
        list(iter_recordings(["."], tmp_path))
    assert str(error.value) == (
        "corpus: no recording in '.' (looked for .3gp, .aac, .aif, .aiff, .amr, .flac, .m4a, .mka, .mkv, .mov, .mp3, "
        ".mp4, .oga, .ogg, .opus, .wav, .webm, .wma); name a folder that holds some"
    )


def test_what_is_named_like_audio_but_is_no_file_is_listed(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").symlink_to("lost.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "folder.wav" / "inside.wav").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    assert names(["."], tmp_path) == ["broken.wav", "folder.wav", "pipe.wav"]
    assert next(iter_recordings(["broken.wav"], tmp_path)).size_bytes == 0
    assert next(iter_recordings(["broken.wav"], tmp_path)).modified_at == EPOCH


def test_a_folder_that_cannot_be_listed_is_listed_itself(calls: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root lists every folder")
    (calls / "sub").chmod(0)
    assert names(["."], calls) == ["b.wav", "sub"]


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        (b"plain name.wav", "plain name.wav"),
        ("Grüße 你好.wav".encode(), "Grüße 你好.wav"),
        (b"100%25.wav", "100%2525.wav"),
        (b"latin-\xfc.wav", "latin-%FC.wav"),
        (b"two\nlines\x7f.wav", "two%0Alines%7F.wav"),
        (b"a#t=1.wav", "a%23t=1.wav"),
        (b"hey!.wav", "hey!.wav"),
    ],
)
def test_a_uri_is_one_line_of_unicode_that_gives_the_path_back(tmp_path: Path, name: bytes, uri: str) -> None:
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        Path(os.fsdecode(path)).touch()
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    (recording,) = iter_recordings(["."], tmp_path)
    assert recording.uri == f"{tmp_path}/{uri}"
    assert unquote_to_bytes(recording.uri) == path


def test_a_folder_named_as_a_member_of_a_tar_has_another_uri(tmp_path: Path) -> None:
    (tmp_path / "a.tar!").mkdir()
    (tmp_path / "a.tar!" / "b.wav").touch()
    (recording,) = iter_recordings(["."], tmp_path)
    assert recording.uri == f"{tmp_path}/a.tar%21/b.wav"


def test_a_recording_is_the_same_in_a_worker_process(calls: Path) -> None:
    for recording in iter_recordings(["."], calls):
        assert pickle.loads(pickle.dumps(recording)) == recording
        assert content_of(pickle.loads(pickle.dumps(recording))) == b"four"


def test_a_recording_over_the_limit_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "a.wav").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a file with a hole, which takes no room
    (recording,) = iter_recordings(["."], tmp_path)
    with pytest.raises(RecordingError, match="has more than 2 GiB; split it, or convert it to FLAC") as error:
        content_of(recording)
    assert error.value.code == "too_large"


def test_a_recording_that_grows_is_not_read_beyond_what_was_listed(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"four")
    (recording,) = iter_recordings(["."], tmp_path)
    with (tmp_path / "a.wav").open("r+b") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(RecordingError, match="has changed since it was listed"):
        content_of(recording)


def test_20_000_recordings_are_listed_in_little_memory(tmp_path: Path) -> None:
    rows = [f"{folder:02}/{name:03}.wav" for folder in range(20) for name in range(1000)]
    for folder in range(20):
        (tmp_path / f"{folder:02}").mkdir()
    for row in rows:
        os.close(os.open(tmp_path / row, os.O_CREAT))
    (tmp_path / "a.csv").write_text("path,text\n" + "".join(f"{row},{'word ' * 20}\n" for row in rows[:5000]))
    for entry, expected in ((".", 20_000), ("a.csv", 5000)):
        tracemalloc.start()
        found = sum(1 for _ in iter_recordings([entry], tmp_path))
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == expected
        assert peak_bytes < 5 * 2**20, entry
