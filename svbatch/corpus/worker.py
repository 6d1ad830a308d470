"""A process that decodes for this one, within limits: started when there is work, and again after it was lost."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from svbatch.corpus.decode import Audio, Channels, Properties, audio_of
from svbatch.corpus.recording import Recording
from svbatch.corpus.source import Code
from svbatch.errors import RecordingError

START_S = 120.0  # to start a process, on a machine that is busy
# No threads beside the one that decodes, nor the address space that they reserve.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of one recording: address space beside twice the file's bytes, and seconds until it is read, or until the next
    block of samples comes."""

    memory_bytes: int = 2**30
    silence_s: float = 300.0


class _LostError(Exception):
    """The process has ended by itself, or by someone else's signal."""


class _SilentError(Exception):
    """The process says nothing for too long."""


class Worker:
    """At most one process at a time. It dies with the thread that it was started in."""

    def __init__(self, channels: Channels, limits: Limits) -> None:
        self._channels, self._limits = channels, limits
        self._lock = threading.Lock()
        self._is_stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def decode(self, recording: Recording, on_block: Callable[[int], None]) -> Audio:
        """Its audio; `on_block` is told how many bytes have come, and may keep the process waiting. Raises
        RecordingError, also for what became of the process. One that ended by itself is tried again."""
        try:
            try:
                return self._decoded(recording, on_block)
            except _LostError as error:
                log.debug("%s: its decoder was lost (%s); once more", recording.uri, error)
                return self._decoded(recording, on_block)
        except _LostError as error:
            what = f"makes the decoder crash ({error}); convert it to WAV or FLAC, or remove it"
            raise _failure(recording, "crashed", what) from None
        except _SilentError:
            self.end()
            what = f"kept the decoder busy for {self._limits.silence_s:g} s without a sample; convert it, or remove it"
            raise _failure(recording, "timed_out", what) from None
        except MemoryError:
            self.end()
            memory = f"{self._limits.memory_bytes / 2**20:.0f} MiB beside the file"
            what = f"needs more memory to decode than {memory}; split it, or convert it to WAV or FLAC"
            raise _failure(recording, "out_of_memory", what) from None

    def stop(self) -> None:
        """Kills the process, now and if one is just being started; from any thread."""
        with self._lock:
            self._is_stopped = True
            process = self._process  # another thread may be ending it
        if process:
            process.kill()

    def end(self) -> str:
        """Kills the process and says how it had ended before, if it had."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection:
            connection.close()
        if process is None:
            return ""
        process.kill()
        code = process.wait()
        return f"exit code {code}" if code >= 0 else signal.Signals(-code).name

    def _decoded(self, recording: Recording, on_block: Callable[[int], None]) -> Audio:
        samples = bytearray()
        try:
            self._ask(recording)
            properties = self._receive_into(samples, recording, on_block)
        except BaseException:
            on_block(-len(samples))
            raise
        return audio_of(properties, samples)

    def _receive_into(self, samples: bytearray, recording: Recording, on_block: Callable[[int], None]) -> Properties:
        while True:
            reply = self._reply()
            if "block" in reply:
                samples += self._receive() if reply["block"] else b""
                on_block(reply["block"])
            elif "done" in reply:
                return Properties(**reply["done"] | {"tracks": tuple(reply["done"]["tracks"])})
            elif "failed" in reply:
                raise RecordingError(*reply["failed"])
            elif "out_of_memory" in reply:
                raise MemoryError
            else:
                log.warning("%s: the decoder failed\n%s", recording.uri, reply["crashed"])
                reason = reply["crashed"].splitlines()[-1][:200]
                raise _failure(recording, "crashed", f"makes the decoder fail ({reason}); convert it, or remove it")

    def _ask(self, recording: Recording) -> None:
        if self._connection is None:
            self._start()
        memory_bytes = self._limits.memory_bytes + 2 * recording.size_bytes
        try:
            self._connected.send((recording, self._channels, memory_bytes))
        except OSError:
            raise _LostError(self.end()) from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from svbatch.corpus.worker_main import serve; "
                f"serve({theirs.fileno()}, {os.getpid()})"
            )
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # decoders complain there of what becomes a failure anyway
                pass_fds=[theirs.fileno()],
                env=os.environ | ENVIRONMENT,
            )
        with self._lock:
            self._process, self._connection = process, Connection(ours.detach())
            if self._is_stopped:
                process.kill()
        if not self._connected.poll(START_S) or not self._is_ready():
            raise RuntimeError(f"a process that decodes cannot be started ({self.end()}): {process.args!r}")

    def _is_ready(self) -> bool:
        try:
            return self._reply() == {"ready": True}
        except _LostError:
            return False

    @property
    def _connected(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def _reply(self) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(self._receive())
        return reply

    def _receive(self) -> bytes:
        try:
            if not self._connected.poll(self._limits.silence_s):
                raise _SilentError
            return self._connected.recv_bytes()
        except (EOFError, OSError):
            raise _LostError(self.end()) from None


def _failure(recording: Recording, code: Code, what: str) -> RecordingError:
    return RecordingError("decode", code, f"{recording.uri} {what}")
