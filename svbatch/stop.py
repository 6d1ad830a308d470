"""How a run is stopped from outside: by a signal, once to end in order, twice to end at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SystemExit):
    """Raised wherever the run is when a signal arrives, but in a commit; the process exits with 130 or 143."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.exit_code = 128 + signum


class SignalStop:
    """While entered, the first SIGINT or SIGTERM raises Stopped, within `committing` at its end; the second ends the
    process on the spot, which costs no more than a kill would."""

    def __init__(self) -> None:
        self._signum: int | None = None
        self._is_committing = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "SignalStop":
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """What is done within is done whole, then the signal that came meanwhile is obeyed."""
        before = self._signum
        self._is_committing = True
        try:
            yield
        finally:
            self._is_committing = False
        if self._signum is not None and before is None:
            raise Stopped(self._signum)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        if self._signum is not None:
            os._exit(128 + signum)
        self._signum = signum
        if not self._is_committing:
            raise Stopped(signum)
