"""Lhotse's recordings and cuts, as their JSON lines write them.

Covered: recordings of one source, a file or an address; cuts of one recording (MonoCut). Refused, by line: what a cut
computes (mixes, padding, changed speed or volume), commands, sound inside the manifest, one channel of several.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svbatch.corpus.manifests.row import Row, WrongLine, metadata_of, seconds_of, span_of, text_of

SPEAKER_COLUMNS = ("speaker", "language", "gender")
TOLERANCE_S = 0.001  # a cut may end this far from its recording's end and be all of it


def is_lhotse(values: Mapping[str, Any]) -> bool:
    """Whether a line is a recording or a cut of Lhotse."""
    return "sources" in values or "recording" in values or str(values.get("type", "")).endswith("Cut")


def row_of_lhotse(values: Mapping[str, Any]) -> Row:
    """The row of a recording or cut. Raises WrongLine."""
    if "sources" in values:
        return Row(_source(values), metadata=metadata_of({"id": values.get("id")}))
    kind = values.get("type", "MonoCut")
    if kind != "MonoCut":
        raise WrongLine(f"is a {kind}; only MonoCut is read: save the audio of such cuts and list the files")
    recording = values.get("recording")
    if not isinstance(recording, dict):
        raise WrongLine("is a cut without its recording; write the cuts with their recordings")
    channels = {channel for source in _objects(recording, "sources") for channel in _list(source, "channels")}
    if len(channels) > 1:
        raise WrongLine("is a cut of one channel of several; split the channels into files of their own")
    start_s, duration_s = (seconds_of(name, values.get(name)) for name in ("start", "duration"))
    is_whole = start_s == 0 and duration_s >= seconds_of("duration", recording.get("duration")) - TOLERANCE_S
    supervisions = sorted(_objects(values, "supervisions"), key=lambda each: seconds_of("start", each.get("start", 0)))
    return Row(
        source=_source(recording),
        span=None if is_whole else span_of(start_s, start_s + duration_s),
        reference=" ".join(_texts(supervisions, "text")) or None,
        metadata=metadata_of(_metadata(values, recording, supervisions)),
    )


def _metadata(
    cut: Mapping[str, Any], recording: Mapping[str, Any], supervisions: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    said = {name: ", ".join(dict.fromkeys(_texts(supervisions, name))) or None for name in SPEAKER_COLUMNS}
    custom = cut.get("custom") or {}
    if not isinstance(custom, dict):
        raise WrongLine("`custom` is not an object")
    return {"id": cut.get("id"), "recording_id": recording.get("id")} | said | custom


def _source(recording: Mapping[str, Any]) -> str:
    sources = _objects(recording, "sources")
    if len(sources) != 1:
        raise WrongLine(f"has {len(sources)} sources; only recordings of one are read")
    if recording.get("transforms"):
        raise WrongLine("is to be transformed as it is read; save it so, and list the file")
    kind = sources[0].get("type")
    if kind not in ("file", "url"):
        raise WrongLine(
            f"has a source of type {str(kind)[:60]!r}; only `file` and `url` are read, and no command is run"
        )
    return text_of("source", sources[0].get("source"))


def _texts(values: Sequence[Mapping[str, Any]], name: str) -> Iterator[str]:
    return (text_of(name, each[name]) for each in values if each.get(name) is not None)


def _objects(values: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = _list(values, name)
    if not all(isinstance(each, dict) for each in found):
        raise WrongLine(f"`{name}` is not a list of objects")
    return found


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name) or []
    if not isinstance(found, list) or any(isinstance(each, list) for each in found):
        raise WrongLine(f"`{name}` is not a list")
    return found
