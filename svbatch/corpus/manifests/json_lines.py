"""JSON lines: our own and NeMo's (columns), Lhotse's recordings and cuts. Each line says which it is."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from svbatch.corpus.manifests.lhotse import is_lhotse, row_of_lhotse
from svbatch.corpus.manifests.row import NAMES, Numbered, Row, WrongLine, row_of_columns

MAX_LINE_BYTES = 2**24


def iter_json_lines(stream: BinaryIO) -> Iterator[Numbered]:
    """Every line that is not blank; one of more than MAX_LINE_BYTES ends the reading."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            yield number, WrongLine(f"has more than {MAX_LINE_BYTES // 2**20} MiB; is this JSON lines?")
            return
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _row(line)
        except WrongLine as wrong:
            yield number, wrong


def _row(line: bytes) -> Row:
    try:
        values: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WrongLine(f"is not a JSON object in UTF-8 ({getattr(error, 'msg', error)})") from error
    if not isinstance(values, dict):
        raise WrongLine("is not a JSON object; write one object per line")
    if not any(name in values for name in NAMES) and is_lhotse(values):
        return row_of_lhotse(values)
    return row_of_columns(values)
