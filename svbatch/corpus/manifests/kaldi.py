"""A Kaldi data folder: wav.scp, and segments, text, utt2spk where they are there.

Text and speakers are held in memory while the folder is listed; segments and recordings are read as they come.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

from svbatch.corpus.manifests.row import Row, WrongLine, metadata_of, seconds_of, span_of
from svbatch.corpus.recording import Span

WAV_SCP = "wav.scp"
MAX_LINE_BYTES = 2**20
Opened = Callable[[str], AbstractContextManager[BinaryIO | None]]  # a file of the folder; None if it is not there
Placed = tuple[str, int, Row | WrongLine]  # file, line


def iter_kaldi(opened: Opened) -> Iterator[Placed]:
    """A row for each segment, or each recording if there are none."""
    wrong: list[Placed] = []
    texts = dict(_pairs(opened, "text", wrong, is_text=True))
    speakers = dict(_pairs(opened, "utt2spk", wrong))
    yield from wrong

    def row(utterance: str, recording: str | None, source: str, span: Span | None) -> Row:
        said = {"utterance": utterance, "recording": recording, "speaker": speakers.get(utterance)}
        return Row(source, span, texts.get(utterance), metadata_of(said))

    recordings: dict[str, str] = {}
    with opened("segments") as segments:
        for number, found in _fields(opened, WAV_SCP):
            if isinstance(found, WrongLine):
                yield WAV_SCP, number, found
            elif found[1].startswith("|") or found[1].endswith("|"):
                yield (
                    WAV_SCP,
                    number,
                    WrongLine("is a command, and none is run; write its sound to a file, and name it"),
                )
            elif found[0] in recordings:
                yield WAV_SCP, number, WrongLine(f"names {found[0]!r} again")
            else:
                recordings[found[0]] = found[1] if segments is not None else ""
                if segments is None:
                    yield WAV_SCP, number, row(found[0], None, found[1], None)
        if segments is not None:
            for number, found in _lines(segments):
                yield "segments", number, found if isinstance(found, WrongLine) else _segment(found, recordings, row)


def _segment(
    found: tuple[str, str], recordings: dict[str, str], row: Callable[[str, str, str, Span | None], Row]
) -> Row | WrongLine:
    utterance, rest = found
    fields = rest.split()
    if len(fields) not in (3, 4):
        return WrongLine("wants an utterance, a recording, a start and an end")
    recording, start, end = fields[:3]
    if recording not in recordings:
        return WrongLine(f"is of recording {recording!r}, which is not in {WAV_SCP}")
    try:
        is_open = end in ("-1", "-1.0")
        span = span_of(seconds_of("start", start), None if is_open else seconds_of("end", end))
    except WrongLine as wrong:
        return wrong
    return row(utterance, recording, recordings[recording], span)


def _pairs(opened: Opened, name: str, wrong: list[Placed], *, is_text: bool = False) -> Iterator[tuple[str, str]]:
    for number, found in _fields(opened, name, is_text=is_text):
        if isinstance(found, WrongLine):
            wrong.append((name, number, found))
        else:
            yield found


def _fields(opened: Opened, name: str, *, is_text: bool = False) -> Iterator[tuple[int, tuple[str, str] | WrongLine]]:
    with opened(name) as stream:
        if stream is not None:
            yield from _lines(stream, is_text=is_text)


def _lines(stream: BinaryIO, *, is_text: bool = False) -> Iterator[tuple[int, tuple[str, str] | WrongLine]]:
    """The key of each line and what follows it, by its number; only a text may be empty."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if not line.strip():
            continue
        try:
            key, *rest = re.split("[ \t]+", line.decode("utf-8").strip(" \t\r\n"), maxsplit=1)
        except UnicodeDecodeError:
            yield number, WrongLine("is not UTF-8")
            continue
        if len(line) > MAX_LINE_BYTES or not (rest or is_text):
            yield number, WrongLine("wants a key, a space and a value")
            continue
        yield number, (key, "".join(rest))
