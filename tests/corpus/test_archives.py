import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.corpus.archives import iter_members
from svbatch.corpus.content import content_of
from svbatch.corpus.folders import status_at
from svbatch.corpus.recording import LocalFile, Recording
from svbatch.corpus.sources import is_audio, iter_recordings
from svbatch.errors import CorpusError, RecordingError

CONTENTS = {"b.wav": b"four", "sub/a.FLAC": b"x" * 5000, "notes.txt": b"no", ".hidden.wav": b"no", "ü #%.ogg": b"o"}


def packed(path: Path, contents: dict[str, bytes] = CONTENTS, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def listed(path: Path) -> list[Recording]:
    return list(iter_recordings([path.name], path.parent))


def why(recording: Recording) -> str:
    with pytest.raises(RecordingError) as error:
        content_of(recording)
    return str(error.value).removeprefix(recording.uri)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_the_audio_in_a_tar_is_listed_in_its_order_and_read_in_place(tmp_path: Path, form: int) -> None:
    path = packed(tmp_path / "shard.tar", form=form)
    recordings = listed(path)
    assert [recording.uri.removeprefix(f"{path}!/") for recording in recordings] == [
        "b.wav",
        "sub/a.FLAC",
        "ü %23%25.ogg",
    ]
    assert [content_of(recording) for recording in recordings] == [b"four", b"x" * 5000, b"o"]
    assert {recording.modified_at for recording in recordings} == {status_at(path).modified_at}
    assert sorted(os.listdir(tmp_path)) == ["shard.tar"]


def test_a_folder_is_searched_for_tars_too(tmp_path: Path) -> None:
    packed(tmp_path / "a.tar", {"1.wav": b"one"})
    (tmp_path / "b.wav").touch()
    found = [recording.uri.removeprefix(f"{tmp_path}/") for recording in iter_recordings(["."], tmp_path)]
    assert found == ["a.tar!/1.wav", "b.wav"]


def test_a_tar_that_was_written_anew_is_not_read_as_the_old(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", {"1.wav": b"one"})
    os.utime(path, (0, 0))
    (recording,) = listed(path)
    packed(path, {"1.wav": b"two"})
    assert why(recording) == " has changed since it was listed; run again when it is complete"


def test_a_tar_that_is_cut_short_fails_beside_the_members_before_the_cut(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.tar", {"1.wav": b"one", "2.wav": b"t" * 2000})
    content = path.read_bytes()
    for length, num_members in ((2 * 512, 1), (2 * 512 + 100, 1), (3 * 512 + 700, 1), (3 * 512 + 2048, 2), (10, 0)):
        path.write_bytes(content[:length])
        *members, tar = listed(path)
        assert len(members) == num_members, length
        assert why(tar).startswith(" is a tar that cannot be read to its end (")
        assert [content_of(member) for member in members] == [b"one", b"t" * 2000][:num_members]


def test_what_is_no_regular_file_in_a_tar_is_a_failure_and_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes(b"secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (
            ("link.wav", tarfile.SYMTYPE),
            ("hard.wav", tarfile.LNKTYPE),
            ("pipe.wav", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(tmp_path / "secret.wav")
            tar.addfile(member)
        tar.add(tmp_path / "secret.wav", arcname="../../up.wav")
    *special, up = listed(tmp_path / "a.tar")
    assert {why(recording) for recording in special} == {
        " is a link, device or sparse file in a tar; pack it as a file"
    }
    assert up.uri == f"{tmp_path}/a.tar!/../../up.wav"
    assert content_of(up) == b"secret"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, os.symlink], ids=["FIFO", "folder", "broken link"])
def test_a_tar_that_is_no_file_is_a_failure(tmp_path: Path, make) -> None:
    path = tmp_path / "a.tar"
    make("lost", path) if make is os.symlink else make(path)
    (recording,) = listed(path)
    assert why(recording) == " is a tar that cannot be read to its end (not a file); copy it again"


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(CorpusError, match="a compressed tar cannot be read in place"):
        listed(tmp_path / "a.tar.gz")


def test_a_header_that_claims_a_negative_size_ends_the_listing(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.wav")
    header = bytearray(member.tobuf())
    header[124:136] = (-1024).to_bytes(12, "big", signed=True)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    (recording,) = listed(tmp_path / "a.tar")
    assert "cannot be read to its end" in why(recording)


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 10239), st.integers(1, 255)), max_size=8), length=st.integers(0, 10240))
def test_no_damage_to_a_tar_raises_or_hangs(tmp_path_factory, flips: list[tuple[int, int]], length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(packed(path, {"b.wav": b"four", "ü.wav": b"x" * 600}).read_bytes())
    assert len(content) == 10240
    for position, mask in flips:
        content[position] ^= mask
    path.write_bytes(content[:length])
    for recording in iter_members(LocalFile(path), status_at(path), is_audio):
        recording.uri.encode()
        try:
            content_of(recording)
        except RecordingError:
            continue
