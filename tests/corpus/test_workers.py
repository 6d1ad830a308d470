"""Decoding in processes of its own: what a decoder does to its process, and what that costs."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile

from svbatch.corpus import workers
from svbatch.corpus.decode import Audio, decode
from svbatch.corpus.recording import Recording, Span
from svbatch.corpus.sources import recording_at
from svbatch.corpus.worker import Limits
from svbatch.corpus.workers import Decoded, decoding
from svbatch.errors import CorpusError, RecordingError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """0.wav … 11.wav, each of another length."""
    path = tmp_path_factory.mktemp("many")
    random = np.random.default_rng(0)
    for number in range(12):
        soundfile.write(path / f"{number}.wav", random.uniform(-0.5, 0.5, (1000 * (number + 1), 2)), 16_000)
    return path


@pytest.fixture
def recordings(folder: Path) -> list[Recording]:
    return [recording_at(folder / f"{number}.wav") for number in range(12)]


def results(recordings: list[Recording], limits: Limits | None = None, num_workers: int = 2) -> list[Decoded]:
    with decoding(recordings, "mix", num_workers=num_workers, limits=limits) as decoded:
        return list(decoded)


def codes(decoded: list[Decoded]) -> list[str | None]:
    return [each.code if isinstance(each, RecordingError) else None for each in decoded]


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "worker_main" in " ".join(child.cmdline())]


def bomb(path: Path, hours: float) -> Recording:
    """Hours of silence in a small FLAC."""
    with soundfile.SoundFile(path, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(round(hours * 60)):
            file.write(np.zeros(8_000 * 60, np.int16))
    return recording_at(path)


@pytest.mark.parametrize("channels", ["mix", "first", "each"])
def test_what_comes_from_a_process_is_what_is_decoded_here(recordings, channels):
    with decoding(recordings, channels, num_workers=2) as decoded:
        for recording, audio in zip(recordings, decoded, strict=True):
            here = decode(recording, channels)
            assert isinstance(audio, Audio)
            np.testing.assert_array_equal(audio.waveforms, here.waveforms)
            assert vars(replace(audio, waveforms=None)) == vars(replace(here, waveforms=None))


def test_no_process_is_left_and_none_is_started_for_nothing(recordings):
    with decoding([], "mix", num_workers=2) as decoded:
        assert list(decoded) == []
        assert children() == []
    with decoding(recordings * 100, "mix", num_workers=2) as decoded:  # more than are decoded ahead
        next(decoded)
        assert 1 <= len(children()) <= 2
    assert children() == []


def test_what_needs_too_much_memory_costs_one_failure(recordings, tmp_path):
    """An hour of silence, read in blocks of 16 MiB, where a process may grow by as much from what short ones leave."""
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for _ in range(60):
            file.write(np.zeros(60 * 16_000))
    with decoding(recordings, "mix", num_workers=1) as short:
        next(short)
        limits = Limits(memory_bytes=children()[0].memory_info().vms + 16 * 2**20)
    decoded = results([*recordings[:2], recording_at(path), *recordings[2:]], limits, num_workers=1)
    assert codes(decoded) == [None, None, "out_of_memory"] + [None] * 10
    assert str(decoded[2]) == (
        f"{path} needs more memory to decode than {limits.memory_bytes / 2**20:.0f} MiB beside the file; "
        "split it, or convert it to WAV or FLAC"
    )


def test_a_process_that_is_killed_is_started_again_and_nothing_is_lost(recordings):
    with decoding(recordings * 100, "mix", num_workers=2) as decoded:
        found = [next(decoded) for _ in range(3)]
        assert children()
        for child in children():
            child.kill()
        found += list(decoded)
    assert codes(found) == [None] * 1200


def test_a_decoder_that_hangs_is_timed_out_and_costs_one_failure(recordings):
    with decoding(_paused(recordings), "mix", num_workers=1, limits=Limits(silence_s=1.0)) as decoded:
        found = list(decoded)
    assert codes(found) == [None, None, "timed_out"] + [None] * 9
    assert "kept the decoder busy for 1 s without a sample" in str(found[2])


def _paused(recordings: list[Recording]) -> Iterator[Recording]:
    """Before the third recording is claimed the process that will decode it is stopped."""
    for number, recording in enumerate(recordings):
        if number == 2:
            for child in children():
                child.suspend()
        yield recording


def test_a_recording_whose_process_dies_twice_is_a_crash(recordings, tmp_path):
    """It takes seconds to decode, and meanwhile its process is killed, and so is the next."""
    long = bomb(tmp_path / "long.flac", 11)
    with decoding([long, *recordings], "mix", num_workers=1) as decoded:
        killed: set[int] = set()
        while len(killed) < 2:
            for child in children():
                if child.pid not in killed and child.cpu_times().user > 0.4:  # it has started, and decodes
                    killed.add(child.pid)
                    child.kill()
            time.sleep(0.01)
        found = list(decoded)
    assert codes(found) == ["crashed"] + [None] * 12
    assert "makes the decoder crash (SIGKILL)" in str(found[0])


def test_a_bomb_is_refused_by_its_header_at_once(recordings, tmp_path):
    recording = bomb(tmp_path / "bomb.flac", 13)
    assert recording.size_bytes < 2 * 2**20
    start = time.monotonic()
    decoded = results([recording, *recordings])
    assert time.monotonic() - start < 10
    assert codes(decoded) == ["too_long"] + [None] * 12


def test_what_is_decoded_ahead_is_bounded(recordings, monkeypatch):
    monkeypatch.setattr(workers, "AHEAD_BYTES", 10_000)
    claimed = []

    def listed() -> Iterator[Recording]:
        for recording in recordings:
            claimed.append(recording)
            yield recording

    with decoding(listed(), "mix", num_workers=2) as decoded:
        next(decoded)
        time.sleep(0.5)
        assert len(claimed) <= 4
        assert codes(list(decoded)) == [None] * 11


def test_an_error_of_the_listing_is_raised_after_what_it_gave(recordings):
    def listed() -> Iterator[Recording]:
        yield from recordings[:2]
        raise CorpusError("the folder is gone")

    with decoding(listed(), "mix", num_workers=2) as decoded:
        assert [isinstance(next(decoded), Audio) for _ in range(2)] == [True, True]
        with pytest.raises(CorpusError, match="the folder is gone"):
            next(decoded)


def test_sigterm_to_the_whole_group_costs_no_recording(recordings):
    """systemd signals every process of a service; the parent alone decides what that means."""
    with decoding(recordings * 100, "mix", num_workers=1) as decoded:
        found = [next(decoded)]
        assert children()
        for child in children():
            child.send_signal(signal.SIGTERM)
            child.send_signal(signal.SIGINT)
        found += list(decoded)
    assert codes(found) == [None] * 1200


def test_processes_die_with_a_parent_that_is_killed(folder):
    code = f"""
        from pathlib import Path
        from svbatch.corpus.sources import recording_at
        from svbatch.corpus.workers import decoding
        with decoding([recording_at(Path({str(folder / "0.wav")!r}))] * 9999, "mix", num_workers=2) as decoded:
            next(decoded), print("started", flush=True)
            input()
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    started = psutil.Process(parent.pid).children()
    assert started
    parent.kill()
    parent.wait()
    parent.stdin.close(), parent.stdout.close()
    _, alive = psutil.wait_procs(started, timeout=5)
    assert alive == []


def test_a_process_loads_no_model(recordings):
    with decoding(recordings * 100, "mix", num_workers=1) as decoded:  # more than are decoded ahead
        next(decoded)
        [child] = children()
        mapped = {Path(each.path).name for each in child.memory_maps() if each.path.startswith("/")}
        assert any("soxr" in name for name in mapped)
        assert not any("torch" in name or "onnxruntime" in name for name in mapped)
        assert child.memory_info().rss < 150 * 2**20


def test_a_span_is_cut_out(folder):
    recording = replace(recording_at(folder / "11.wav"), span=Span(0.25, 0.5))
    [audio] = results([recording])
    whole = decode(recording_at(folder / "11.wav"))
    assert isinstance(audio, Audio)
    np.testing.assert_array_equal(audio.waveform, whole.waveform[4000:8000])
    assert audio.recording_id != whole.recording_id
