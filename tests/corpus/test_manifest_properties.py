"""What holds of a manifest whatever it contains."""

import gzip
import io
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from manifests import CUT, RECORDING, Row, formats, json_lines, rows_of

from svbatch.corpus.recording import LocalFile, RemoteFile, Span, source_of_uri, source_uri
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError

PROPERTY = settings(max_examples=100, deadline=None)

# What a path can hold below the manifest's folder: no NUL, no part that goes up, nothing that is an address.
parts = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda part: part not in (".", "..")
)
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
spans = st.none() | st.tuples(st.integers(0, 10**12), st.integers(1, 10**10))


@formats
@PROPERTY
@example(path="a\nb.wav", text='"quoted", and\r\nnew', note="\ufeff", micros=(1, 1))
@given(path=paths, text=texts, note=texts, micros=spans)
def test_any_name_text_and_span_comes_back(
    tmp_path_factory, name: str, path: str, text: str, note: str, micros: tuple[int, int] | None
) -> None:
    folder = tmp_path_factory.getbasetemp()
    row: Row = {"path": path, "reference": text, "note": note}
    span = None
    if micros is not None:
        span = Span(round(micros[0] / 1e6, 6), round((micros[0] + micros[1]) / 1e6, 6))
        row |= {"start": span.start_s, "end": span.end_s}
    (recording,) = rows_of(folder, name, row)
    assert recording.location == LocalFile(folder / path)
    assert (recording.reference, recording.metadata, recording.span) == (text, {"note": note}, span)
    assert source_of_uri(recording.uri) == (str(folder / path), span)
    assert recording.uri.isprintable() or not any(ord(sign) < 32 for sign in recording.uri)


@PROPERTY
@given(
    name=st.text(st.characters(exclude_categories=["Cs", "Zs", "Cc"], exclude_characters="/ "), min_size=1).filter(
        lambda name: not (name.startswith("|") or name.endswith("|") or name in (".", ".."))
    ),
    words=st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1), min_size=1),
)
def test_kaldi_names_and_words_come_back(tmp_path_factory, name: str, words: list[str]) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "wav.scp").write_text(f"key {name}\n", encoding="utf-8", newline="")
    (folder / "text").write_text(f"key {' '.join(words)}\n", encoding="utf-8", newline="")
    (recording,) = iter_recordings(["wav.scp"], folder)
    assert recording.location == LocalFile(folder / name)
    assert recording.reference == " ".join(words)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(
    [
        *("path", "uri", "audio", "audio_filepath", "start", "offset", "end", "duration", "text", "reference"),
        *("id", "sources", "recording", "type", "supervisions", "custom", "channel", "other"),
    ]
)


def accounted(path: Path) -> None:
    """Lists a manifest; only a CorpusError may come of it, and only rows that tables can hold."""
    try:
        for recording in iter_recordings([path.name], path.parent, follow_outside=True):
            for text in (recording.uri, recording.reference or "", *recording.metadata, *recording.metadata.values()):
                text.encode()
            assert isinstance(recording.location, LocalFile | RemoteFile)
    except CorpusError:
        return


@PROPERTY
@example(rows=[CUT | {"recording": RECORDING | {"sources": [{"type": "file", "channels": [[]], "source": "a"}]}}])
@example(rows=[{"path": "a.wav", "start": 10**400}])
@given(rows=st.lists(st.dictionaries(keys, values), min_size=1, max_size=3))
def test_values_of_a_wrong_type_are_a_corpus_error_and_nothing_else(tmp_path_factory, rows: list[Row]) -> None:
    path = tmp_path_factory.getbasetemp() / "types.jsonl"
    json_lines(path, [{key: no_address(value) for key, value in row.items()} for row in rows])
    accounted(path)


def no_address(value: Any) -> Any:
    return value.replace("://", "") if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "wav.scp"])
@PROPERTY
@given(content=st.binary(max_size=200).filter(lambda content: b"://" not in content), is_headed=st.booleans())
def test_any_bytes_are_a_manifest_or_a_corpus_error(
    tmp_path_factory, name: str, content: bytes, is_headed: bool
) -> None:
    path = (
        tmp_path_factory.mktemp("any", numbered=True) / name
        if name == "wav.scp"
        else (tmp_path_factory.getbasetemp() / name)
    )
    head = {"a.csv": b"path,text\n", "a.jsonl": b'{"path": "a"}\n'}.get(name, b"") if is_headed else b""
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") and is_headed else head + content)
    accounted(path)


@PROPERTY
@given(
    kind=st.sampled_from([pa.binary(), pa.int64(), pa.float64(), pa.bool_(), pa.timestamp("ns"), pa.list_(pa.int8())])
)
def test_parquet_columns_of_any_type_are_a_corpus_error_or_rows(tmp_path_factory, kind: pa.DataType) -> None:
    path = tmp_path_factory.getbasetemp() / "kinds.parquet"
    value = {pa.binary(): b"\xff", pa.bool_(): True, pa.list_(pa.int8()): [1]}.get(kind, 1)
    for name in ("path", "start", "text", "note"):
        columns = {"path": pa.array(["a.wav"]), name: pa.array([value], kind)}
        pq.write_table(pa.table(columns), path)
        accounted(path)


@PROPERTY
@given(path=st.lists(st.binary(min_size=1, max_size=10), min_size=1, max_size=3).map(b"/".join))
def test_a_uri_gives_any_path_back(path: bytes) -> None:
    name = "/" + os.fsdecode(path.replace(b"\0", b""))
    uri = source_uri(LocalFile(Path(name)))
    assert source_of_uri(uri.replace(".tar!/", "")) == (str(Path(name)).replace(".tar!/", ""), None)
    assert uri.encode().isascii() or uri.isprintable() or "\n" not in uri
    assert io.StringIO(uri, newline="\n").readlines() == [uri]
