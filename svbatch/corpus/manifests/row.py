"""One recording as a manifest names it, made of columns. Pure: nothing is looked up."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from svbatch.corpus.recording import MAX_SECONDS, Span, source_of_uri

# The first of each that a row has is used; the others of a kind are metadata.
NAMES = ("path", "uri", "audio", "audio_filepath")
STARTS = ("start", "offset")
REFERENCES = ("reference", "text", "transcript")
TOLERANCE_S = 0.001  # between `end` and `start` plus `duration`


class WrongLine(ValueError):
    """A line of a manifest that cannot be understood; says why, without the place."""


@dataclass(frozen=True)
class Row:
    """`source` is a path, relative to the manifest's folder, or an address."""

    source: str
    span: Span | None = None
    reference: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


Numbered = tuple[int, Row | WrongLine]  # by line, the first is 1


def row_of_columns(columns: Mapping[str, Any]) -> Row:
    """The row that named values say; None and "" are no value. Raises WrongLine.

    A `duration` is the end of a span only beside a start: alone it tells the length of the file.
    """
    values = {name: value for name, value in columns.items() if value is not None and value != ""}
    name = next((name for name in NAMES if name in values), None)
    if name is None:
        raise WrongLine(f"names no recording; it wants one of {', '.join(NAMES)}")
    source, span = text_of(name, values.pop(name)), None
    if name == "uri":
        try:
            source, span = source_of_uri(source)
        except ValueError as error:
            raise WrongLine(str(error)) from error
    start = next((name for name in STARTS if name in values), None)
    if start is not None or "end" in values:
        span = _span(values, start)
    reference = next((name for name in REFERENCES if name in values), None)
    text = None if reference is None else text_of(reference, values.pop(reference))
    return Row(source, span, text, metadata_of(values))


def _span(values: dict[str, Any], start: str | None) -> Span | None:
    """The span that a start, an end and a duration say; they are taken out of `values`."""
    start_s = 0.0 if start is None else seconds_of(start, values.pop(start))
    end_s = seconds_of("end", values.pop("end")) if "end" in values else None
    if start is not None and "duration" in values:
        by_duration_s = start_s + seconds_of("duration", values.pop("duration"))
        if end_s is not None and abs(end_s - by_duration_s) > TOLERANCE_S:
            raise WrongLine(f"end {end_s:g} s is not start plus duration, {by_duration_s:g} s; leave one of them out")
        end_s = by_duration_s if end_s is None else end_s
    return span_of(start_s, end_s)


def span_of(start_s: float, end_s: float | None) -> Span | None:
    """A span in whole microseconds; None if it is all of its source. Raises WrongLine."""
    start_s, end_s = round(start_s, 6), None if end_s is None else round(end_s, 6)
    if end_s is not None and end_s <= start_s:
        raise WrongLine(f"ends at {end_s:g} s, not after its start at {start_s:g} s")
    return None if start_s == 0 and end_s is None else Span(start_s, end_s)


def seconds_of(name: str, value: Any) -> float:
    """A number of seconds, from a number or its text. Raises WrongLine."""
    seconds = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            seconds = float(value)
    if not 0 <= seconds <= MAX_SECONDS:
        raise WrongLine(f"`{name}` is {_shown(value)}, not a number of seconds from 0")
    return seconds


def text_of(name: str, value: Any) -> str:
    """A value that must be text. Raises WrongLine."""
    if not isinstance(value, str):
        raise WrongLine(f"`{name}` is {_shown(value)}, not text")
    return _unicode(name, value)


def metadata_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Values as text by name: text as it is, any other as JSON writes it; null is left out. Raises WrongLine."""
    return dict(_texts(values))


def _texts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, bytes):
            raise WrongLine(f"`{name}` holds bytes, not text; leave the column out")
        if value is not None:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield _unicode(name, name), _unicode(name, text)


def _unicode(name: str, text: str) -> str:
    """`text` if a table can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WrongLine(f"{_shown(name)} holds what is not UTF-8; write the manifest as UTF-8") from error
    return text


def _shown(value: Any) -> str:
    """A value of any kind as a short piece of a line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
