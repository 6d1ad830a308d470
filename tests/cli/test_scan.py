import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile

from svbatch.cli import entry
from svbatch.corpus.workers import num_processors
from svbatch.scan import scan
from svbatch.tables.schemas import arrow_schema


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """call("recordings") -> exit code, standard output, standard error, of `svbatch scan` in tmp_path."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def entered(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svbatch", "scan", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            entry()
        return left.value.code, *capsys.readouterr()

    return entered


@pytest.fixture
def folder(tmp_path) -> Path:
    """A second of noise and a second of silence, its copy, the same at 8 kHz in stereo as FLAC, and a broken file."""
    path = tmp_path / "recordings"
    path.mkdir()
    random = np.random.default_rng(0)
    sound = np.concatenate([random.uniform(-0.5, 0.5, 16_000), np.zeros(16_000)])
    soundfile.write(path / "a.wav", sound, 16_000)
    (path / "b.wav").write_bytes((path / "a.wav").read_bytes())
    soundfile.write(path / "c.flac", np.stack([sound, sound], axis=1), 8_000)
    (path / "d.wav").write_bytes(b"RIFF but no more")
    return path


def test_a_scan_is_a_table_and_a_summary(call, folder, tmp_path):
    code, out, err = call("recordings")
    assert (code, err) == (3, "")
    assert out.splitlines() == [
        "4 recordings: 3 readable, 1 not",
        "audio         0.00 hours, 50% of it silence",
        "durations     2.0 s to 4.0 s, half of them up to 2.0 s",
        "formats       wav pcm_16 in 2, flac pcm_16 in 1",
        "sample rates  16000 Hz in 2, 8000 Hz in 1",
        "channels      1 in 2, 2 in 1",
        "duplicates    1 hold the bytes of another",
        "unreadable    truncated in 1",
        f"  {folder}/d.wav is cut short or damaged: 1953849880 bytes that its header promises are not there; "
        "copy or record it again",
        "",
        "table: scan.parquet",
    ]
    table = pl.read_parquet(tmp_path / "scan.parquet")
    assert table.columns == arrow_schema("scan").names
    assert [Path(uri).name for uri in table["uri"]] == ["a.wav", "b.wav", "c.flac", "d.wav"]
    assert table["duplicate_of"].to_list() == [None, f"{folder}/a.wav", None, None]
    assert table["silence"].to_list() == [pytest.approx(0.5), pytest.approx(0.5), pytest.approx(0.5, abs=0.01), None]
    assert table["channels"].to_list() == [1, 1, 2, None]
    assert table["code"].to_list() == [None, None, None, "truncated"]


def test_quiet_says_nothing_where_all_can_be_read(call, folder, tmp_path):
    (folder / "d.wav").unlink()
    assert call("recordings", "--quiet", "--output", tmp_path / "other.parquet") == (0, "", "")
    assert pl.read_parquet(tmp_path / "other.parquet").height == 3
    assert not (tmp_path / "scan.parquet").exists()


def test_a_corpus_that_is_not_there_is_exit_2_and_leaves_no_table(call, tmp_path):
    code, out, err = call("lost")
    assert (code, out) == (2, "")
    assert "corpus: nothing is at 'lost'" in err
    assert list(tmp_path.iterdir()) == []


def test_a_table_that_cannot_be_written_is_exit_2_and_named(call, folder):
    code, _, err = call("recordings", "--output", "nowhere/scan.parquet")
    assert code == 2
    assert "nowhere/scan.parquet: the table cannot be written there" in err


def test_a_table_is_replaced_only_by_a_complete_one(folder, tmp_path, monkeypatch):
    scan([str(folder)], tmp_path, tmp_path / "scan.parquet", quiet=True)
    before = (tmp_path / "scan.parquet").read_bytes()
    monkeypatch.setattr("svbatch.scan._count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scan([str(folder)], tmp_path, tmp_path / "scan.parquet", quiet=True)
    assert (tmp_path / "scan.parquet").read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["recordings", "scan.parquet"]


def test_a_line_of_json_says_now_and_then_how_far_it_is(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("svbatch.scan.SECONDS_PER_LINE", 0)
    scan([str(folder)], tmp_path, tmp_path / "scan.parquet", quiet=False)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert lines[-1] == {"recordings": 4, "unreadable": 1, "audio_seconds": 8.0}


def test_scan_loads_no_torch_and_no_model(folder, tmp_path):
    code = (
        "import sys\nfrom svbatch.cli import entry\n"
        "try: entry()\n"
        "except SystemExit as left: print(left.code, {'torch', 'transformers', 'onnxruntime'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, "scan", str(folder)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert said.stdout.splitlines()[-1] == "3 set()"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """100,000 files take little more than 10,000; what remains is their names and digests."""
    (tmp_path / "many").mkdir()
    random = np.random.default_rng(0)
    peaks = []
    for count in (10_000, 100_000):
        for number in range(len(os.listdir(tmp_path / "many")), count):
            samples = random.integers(-9000, 9000, 160, dtype=np.int16)
            soundfile.write(tmp_path / "many" / f"{number:06}.wav", samples, 16_000)
        code = (
            "import sys, resource; from pathlib import Path; from svbatch.scan import scan\n"
            "found = scan([sys.argv[1]], Path.cwd(), Path(sys.argv[1]).with_name('scan.parquet'), quiet=True)\n"
            "print(found.readable, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        said = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "many")], capture_output=True, text=True, check=True
        )
        readable, peak_kib = map(int, said.stdout.split())
        assert readable == count
        peaks.append(peak_kib / 1024)
    print(f"{peaks[0]:.0f} MiB for 10,000 files, {peaks[1]:.0f} MiB for 100,000, {num_processors()} processors")
    assert peaks[1] - peaks[0] < 200
