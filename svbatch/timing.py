"""Where the time of a run goes, by part. Nothing is counted unless someone watches."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

COUNTING = "counting"


@dataclass
class Spent:
    """What one part took: seconds of the clock, and operations by the precision that they were done in (a
    multiplication with its addition is two)."""

    seconds: float = 0.0
    operations: dict[str, float] = field(default_factory=lambda: defaultdict(float))


_watched: ContextVar[dict[str, Spent] | None] = ContextVar("watched", default=None)
_current: ContextVar[str] = ContextVar("current", default="")


@contextmanager
def watching() -> Iterator[dict[str, Spent]]:
    """Counts what is done inside, by part."""
    spent: dict[str, Spent] = defaultdict(Spent)
    token = _watched.set(spent)
    try:
        yield spent
    finally:
        _watched.reset(token)


@contextmanager
def part(name: str) -> Iterator[None]:
    """What is done inside counts for `name`; parts do not overlap."""
    spent = _watched.get()
    if spent is None:
        yield
        return
    assert not _current.get(), f"the part {name} lies inside {_current.get()}"
    token = _current.set(name)
    start = time.perf_counter()
    try:
        yield
    finally:
        spent[name].seconds += time.perf_counter() - start
        _current.reset(token)


@contextmanager
def counting() -> Iterator[None]:
    """What is done inside serves the counting alone: its time is taken off the part that is going on."""
    start = time.perf_counter()
    yield
    spent = _watched.get()
    if spent is not None:
        took = time.perf_counter() - start
        spent[_current.get()].seconds -= took
        spent[COUNTING].seconds += took


def is_watched() -> bool:
    """Whether operations are counted at all."""
    return _watched.get() is not None


def count(operations: float, precision: str) -> None:
    """Operations of the part that is going on, in "float32" or "bfloat16"."""
    spent = _watched.get()
    if spent is not None:
        spent[_current.get()].operations[precision] += operations
