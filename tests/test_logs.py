import io
import json
import logging
import sys
from collections.abc import Iterator

import pytest

from svbatch.logs import run_lines


@pytest.fixture
def stderr(monkeypatch) -> Iterator[io.StringIO]:
    """Standard error as svbatch's own handler sees it."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logger, handler = logging.getLogger("svbatch"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield stream
    logger.removeHandler(handler)


def test_off_a_terminal_each_line_is_json_with_the_runs_id_and_its_figures(stderr):
    with run_lines("run-1", quiet=False):
        logging.getLogger("svbatch.gather").info("committed %d", 3, extra={"figures": {"recordings": 3}})
        try:
            _ = 1 / 0
        except ZeroDivisionError:
            logging.getLogger("svbatch.run").exception("two\nlines")
    info, error = map(json.loads, stderr.getvalue().splitlines())
    assert info | {"time": ""} == {
        "time": "",
        "level": "info",
        "run_id": "run-1",
        "message": "committed 3",
        "recordings": 3,
    }
    assert error["run_id"] == "run-1"
    assert "ZeroDivisionError" in error["traceback"]


def test_on_a_terminal_each_line_is_text_with_the_runs_id(stderr, monkeypatch):
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stderr)  # pytest has put its own there since
    with run_lines("run-1", quiet=False):
        logging.getLogger("svbatch.gather").info("committed %d", 3)
    assert stderr.getvalue() == "run-1  committed 3\n"


def test_quiet_leaves_warnings_and_nothing_is_left_changed(stderr):
    with run_lines("run-1", quiet=True):
        logging.getLogger("svbatch.run").info("nothing")
        logging.getLogger("svbatch.run").warning("something")
    logging.getLogger("svbatch.run").info("after")
    first, second = stderr.getvalue().splitlines()
    assert (json.loads(first)["message"], second) == ("something", "after")
