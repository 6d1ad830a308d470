import json
import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress

from svbatch.training import progress
from svbatch.training.progress import with_progress


def test_off_a_terminal_a_line_now_and_then_says_how_far_it_has_come(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", -1.0)
    assert list(with_progress(range(4), "frames", done=2)) == [0, 1, 2, 3]
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["doing"], line["done"], line["of"]) for line in lines] == [("frames", n, 6) for n in (3, 4, 5, 6)]
    assert lines[-1]["seconds_left"] == 0


def test_what_is_short_says_nothing(capsys):
    assert list(with_progress("ab", "frames")) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar():
    code = "from svbatch.training.progress import with_progress\nlist(with_progress(range(3), 'frames', done=1))"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True)
    os.close(theirs)
    shown = b""
    with open(ours, "rb", buffering=0) as file, suppress(OSError):  # how Linux tells the end of a terminal
        while read := file.read(10_000):
            shown += read
    assert b"frames: 100%" in shown
    assert b"4/4" in shown
