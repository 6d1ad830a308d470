"""How the lines of a run look on standard error: text on a terminal, JSON elsewhere; both with the run's id."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from svbatch.errors import SvbatchError


class RunLines(logging.Formatter):
    """Formats records of one run. What a caller gives as `extra={"figures": {...}}` are keys of their own in JSON."""

    def __init__(self, run_id: str | None, *, as_json: bool) -> None:
        """run_id: None where no run had begun."""
        super().__init__("%(message)s")
        self._run_id, self._as_json = run_id, as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line, but for a traceback on a terminal."""
        if not self._as_json:
            return f"{self._run_id}  {super().format(record)}"
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **({"run_id": self._run_id} if self._run_id else {}),
            "message": record.getMessage(),
            **getattr(record, "figures", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def error_line(message: str, run_id: str | None) -> str:
    """The error that ended a run, as its log lines are off a terminal."""
    record = logging.makeLogRecord({"levelname": "ERROR", "msg": message})
    return RunLines(run_id, as_json=True).format(record)


@contextmanager
def run_lines(run_id: str, *, quiet: bool) -> Iterator[None]:
    """Within, svbatch's log lines are those of a run, and its errors know the run. quiet: only warnings and errors."""
    logger = logging.getLogger("svbatch")
    formats = {handler: handler.formatter for handler in logger.handlers}
    level = logger.level
    for handler in formats:
        handler.setFormatter(RunLines(run_id, as_json=not sys.stderr.isatty()))
    if quiet:
        logger.setLevel(logging.WARNING)
    try:
        yield
    except SvbatchError as error:
        error.run_id = run_id
        raise
    finally:
        logger.setLevel(level)
        for handler, formatter in formats.items():
            handler.setFormatter(formatter)
