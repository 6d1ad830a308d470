"""How far training and measuring have come: a bar on a terminal, a JSON line now and then elsewhere."""

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

SECONDS_PER_LINE = 60.0
Thing = TypeVar("Thing")


def with_progress(things: Sequence[Thing], what: str, *, done: int = 0) -> Iterator[Thing]:
    """The things one by one, told on standard error as `what`; `done` of them were done before."""
    if os.environ.get("RANK", "0") != "0":  # one of several processes that are trained in; the first tells
        yield from things
        return
    if sys.stderr.isatty():
        yield from tqdm(things, desc=what, initial=done, total=done + len(things))
        return
    began_at = said_at = time.monotonic()
    for number, thing in enumerate(things):
        yield thing
        now = time.monotonic()
        if now - said_at > SECONDS_PER_LINE:
            said_at = now
            left = (now - began_at) / (number + 1) * (len(things) - number - 1)
            line = {"doing": what, "done": done + number + 1, "of": done + len(things), "seconds_left": round(left)}
            print(json.dumps(line), file=sys.stderr, flush=True)
