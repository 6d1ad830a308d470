import os
import subprocess
import sys
from pathlib import Path

import pytest

from svbatch.cache import cache_dir, derived
from svbatch.errors import BundleError

VARIABLES = ("SVBATCH_CACHE", "XDG_CACHE_HOME", "HOME")


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        ("/o", {"SVBATCH_CACHE": "/s", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/o"),
        (None, {"SVBATCH_CACHE": "/s", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/s"),
        (None, {"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/svbatch"),
        (None, {"HOME": "/h"}, "/h/.cache/svbatch"),
        (None, {"SVBATCH_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/svbatch"),
        (None, {"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/svbatch"),
    ],
)
def test_the_option_wins_then_svbatch_cache_then_xdg_then_home(monkeypatch, option, environment, expected):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir(Path(option) if option else None) == Path(expected)


def test_a_relative_cache_stays_where_it_was_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    named = cache_dir(Path("weights"))
    monkeypatch.chdir("/")
    assert named == tmp_path / "weights"


def test_no_place_for_a_cache_names_all_three_ways_to_give_one(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BundleError, match=r"--cache DIR.*SVBATCH_CACHE.*XDG_CACHE_HOME"):
        cache_dir(None)


def test_a_derived_folder_is_made_once(tmp_path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"expanded")

    folders = [derived(tmp_path / "cache", "llm-0123", make) for _ in range(2)]
    assert folders == [tmp_path / "cache" / "derived" / "llm-0123"] * 2
    assert (folders[0] / "inner" / "weights").read_bytes() == b"expanded"
    assert len(made) == 1


def test_a_derived_folder_that_failed_halfway_is_not_there(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise ValueError("broken source")

    with pytest.raises(ValueError, match="broken source"):
        derived(tmp_path, "llm", fail)
    assert [path.name for path in (tmp_path / "derived").iterdir()] == [".llm.lock"]
    assert derived(tmp_path, "llm", lambda folder: (folder / "whole").touch()).is_dir()


def test_a_full_disk_while_deriving_names_the_place_and_the_remedy(tmp_path):
    def fill(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(BundleError, match=r"derived/llm: cannot be written: No space.*SVBATCH_CACHE"):
        derived(tmp_path, "llm", fill)


def test_a_cache_that_cannot_be_made_names_the_place_and_the_remedy(tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(BundleError, match=r"cache/derived: cannot be written: .*--cache or SVBATCH_CACHE"):
        derived(tmp_path / "cache", "llm", lambda folder: None)


def test_two_processes_derive_once_and_both_see_it_whole(tmp_path):
    script = """
import sys, time
from pathlib import Path
from svbatch.cache import derived

def make(folder):
    with open(sys.argv[1] + "/made", "a") as log:
        log.write("made\\n")
    (folder / "a").write_text("a")
    time.sleep(0.5)
    (folder / "b").write_text("b")

print(sorted(path.name for path in derived(Path(sys.argv[1]), "llm", make).iterdir()))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=os.getcwd()) for _ in range(2)]
    assert [process.communicate()[0] for process in processes] == ["['a', 'b']\n"] * 2
    assert (tmp_path / "made").read_text() == "made\n"
