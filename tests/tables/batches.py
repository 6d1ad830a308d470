"""Batches of recordings with their rows, as tests of the store write and read them."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from deltalake import DeltaTable

from svbatch.tables.schemas import table_of

WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def asr(files, version="v1"):
    """Two segments per recording of `files` (uri -> its bytes as text), the bytes being what is said."""
    return table_of("asr", [
        {"uri": uri, "recording_id": sha256(said), "channel": None, "start": start, "end": start + 1,
         "text": said, "words": [{"word": said, "start": start, "end": start + 1}], "num_tokens": 3,
         "avg_logprob": -0.5, "finish_reason": "stop", "no_speech_probability": 0.1, "via": "recogniser",
         "task_version": version, "run_id": "run", "annotated_at": WHEN}
        for uri, said in files.items() for start in (0.0, 1.0)
    ])  # fmt: skip


def recordings(files, version="v1"):
    """One row per recording; the bytes None could not be read."""
    return table_of("recordings", [
        {"uri": uri, "recording_id": said and sha256(said), "size_bytes": 9, "modified_at": WHEN,
         "etag": None, "span_start": None, "span_end": None, "reference": None, "metadata": [], "duration": 2.0,
         "sample_rate": 16_000, "channels": 1, "num_segments": 2 if said else 0,
         "status": "annotated" if said else "failed", "answered": [f"asr@{version}"], "run_id": "run",
         "annotated_at": WHEN}
        for uri, said in files.items()
    ])  # fmt: skip


def failures(*failed):
    """One row per (uri, bytes, task, code)."""
    return table_of("failures", [
        {"uri": uri, "recording_id": said and sha256(said), "channel": None, "start": None, "end": None,
         "task": task, "task_version": task and "v1", "stage": "decode", "code": code,
         "message": f"{uri} failed", "run_id": "run", "failed_at": WHEN}
        for uri, said, task, code in failed
    ])  # fmt: skip


def commit(store, files, version="v1", failed=()):
    read = {uri: said for uri, said in files.items() if said}
    store.commit({"asr": asr(read, version)}, failures(*failed), recordings(files, version))


def texts(store):
    return sorted((row["uri"], row["start"], row["text"]) for row in store.read("asr").to_pylist())


def expected(files):
    return sorted((uri, start, said) for uri, said in files.items() for start in (0.0, 1.0))


def writes(store, table):
    """What the log says of each write, newest first."""
    history = DeltaTable(store.output / table).history()
    return [each["operationParameters"] for each in history if each["operation"] == "WRITE"]


def snapshot(store, table):
    """Names of the table's files, by its log."""
    return sorted(Path(uri).name for uri in DeltaTable(store.output / table).file_uris())


def files_of(store, table):
    return sorted(path.name for path in (store.output / table).iterdir() if path.name != "_delta_log")
