"""What runs in a worker's process: it decodes one recording after the other. It imports no model and no torch.

Asked by pickled messages, it answers by JSON, or by the samples that the JSON before announces: whoever takes over a
decoder cannot hand the parent a pickle.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Generator
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from svbatch.corpus.decode import Contents, Properties, iter_decoded
from svbatch.errors import RecordingError

PR_SET_PDEATHSIG = 1


def serve(fd: int, parent: int) -> None:
    """Decodes what comes over the socket `fd` until it ends, or the process `parent` does."""
    _die_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    logging.disable()
    contents = Contents()
    with Connection(fd) as connection:
        try:
            _say(connection, ready=True)
            while True:
                recording, channels, memory_bytes = connection.recv()
                _limit_memory(memory_bytes)
                _decode(connection, iter_decoded(recording, channels, contents))
        except (EOFError, OSError):  # the parent has gone
            return


def _decode(connection: Connection, blocks: Generator[bytes, None, Properties]) -> None:
    try:
        while True:
            block = next(blocks)
            _say(connection, block=len(block))
            if block:
                connection.send_bytes(block)
    except StopIteration as end:
        _say(connection, done=asdict(end.value))
    except RecordingError as error:
        _say(connection, failed=[error.stage, error.code, str(error)])
    except MemoryError:
        _say(connection, out_of_memory=True)
    except Exception:  # a bug of ours or of a decoder
        _say(connection, crashed=traceback.format_exc())


def _say(connection: Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _die_with(parent: int) -> None:
    """Also where the parent is killed while a decoder hangs; elsewhere than on Linux it ends at its next block."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit()


def _limit_memory(size_bytes: int) -> None:
    if sys.platform == "linux":  # macOS takes no limit of the address space
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes, resource.RLIM_INFINITY))
