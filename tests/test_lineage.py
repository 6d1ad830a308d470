import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from svbatch.errors import ExitCode, OutputError
from svbatch.job import Job, load_job
from svbatch.lineage import with_lineage
from svbatch.run import Outcome

NOW = datetime(2026, 1, 2, tzinfo=UTC)


class Receiver(ThreadingHTTPServer):
    """An OpenLineage server on loopback that keeps what it gets."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.events: list[dict] = []


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.path == "/api/v1/lineage"
        self.server.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver(request, monkeypatch) -> Iterator[Receiver]:
    with Receiver(getattr(request, "param", 201)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("OPENLINEAGE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def job(tmp_path) -> Job:
    (tmp_path / "job.yaml").write_text("corpus: [calls/, s3://b/c]\ntasks: [asr]\noutput: out\n")
    return load_job(tmp_path / "job.yaml")


def outcome(ended: tuple[ExitCode, str] | None = None) -> Outcome:
    return Outcome("run", NOW, NOW, 1, 0, 0, 0, 0, 1.0, ended=ended)


def test_start_and_end_are_told_with_corpus_and_tables(receiver, job):
    assert with_lineage(job, "run-1", outcome) == outcome()
    start, end = receiver.events
    assert (start["eventType"], end["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == end["run"]["runId"]
    assert [each["name"] for each in end["inputs"]] == [f"{job.corpus_base}/calls", "s3://b/c"]
    assert [Path(each["name"]).name for each in end["outputs"]] == ["asr", "recordings", "failures", "runs"]
    assert end["job"]["name"] == str(job.path)


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        ((ExitCode.MORE, "time"), "ABORT"),
        ((ExitCode.TERMINATED, "signal"), "ABORT"),
        ((ExitCode.FAILURES, "x"), "FAIL"),
    ],
)
def test_a_run_that_ended_early_says_why(receiver, job, ended, state):
    with_lineage(job, "run-2", lambda: outcome(ended))
    assert receiver.events[-1]["eventType"] == state
    assert receiver.events[-1]["run"]["facets"]["errorMessage"]["message"] == ended[1]


def test_a_run_that_could_not_go_on_is_told_and_its_error_is_raised(receiver, job):
    def fail() -> Outcome:
        raise OutputError("the disk is full")

    with pytest.raises(OutputError, match="the disk is full"):
        with_lineage(job, "run-3", fail)
    assert receiver.events[-1]["eventType"] == "FAIL"


@pytest.mark.parametrize("receiver", [400], indirect=True)
def test_a_server_that_takes_no_event_is_a_warning(receiver, job, caplog):
    assert with_lineage(job, "run-4", outcome) == outcome()
    assert [record.levelname for record in caplog.records if record.name == "svbatch.lineage"] == ["WARNING"] * 2


def test_without_a_server_nothing_is_told_and_no_client_is_needed(job, monkeypatch):
    monkeypatch.delenv("OPENLINEAGE_URL", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "openlineage.client", None)
    assert with_lineage(job, "run-5", outcome) == outcome()
    monkeypatch.setenv("OPENLINEAGE_URL", "http://127.0.0.1:1")
    with pytest.raises(Exception, match=r"pip install 'svbatch\[lineage\]'"):
        with_lineage(job, "run-6", outcome)
