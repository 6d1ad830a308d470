"""A model on disk: a folder with `bundle.json`, which names every part, its sha256, licence and origin.

What was trained here lies in the folder (`files`, a few megabytes) and is hashed each time the bundle is
found. What others trained (`fetched`) lies in the user's cache; it is hashed when it is fetched and by
`check`. At other times only its size is looked at, because hashing costs as much as a run with nothing new.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from svbatch.cache import cache_dir, cached_file
from svbatch.errors import BundleError

SHIPPED_DIR = Path(__file__).parent / "bundles"
MANIFEST_NAME = "bundle.json"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[
    str,
    Field(pattern=r"^(pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.+!_-]+/.+|hf:[^/]+/[^/]+/.+|https?://.+|file:/.+)$"),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Part):
    sha256: Sha256
    size_bytes: PositiveInt
    licence: str


class FetchedEntry(FileEntry):
    """`from`: where it can be had, tried in order (see svbatch.fetch)."""

    addresses: list[Address] = Field(alias="from", min_length=1)


class EncoderPart(_Part):
    """`external_data`: the file name by which the graph calls its weights, assembled into the cache unless it lies in
    the bundle; null if the graph holds them itself. `width`: of a frame, all layers where it holds several, of which
    the last `voice_width` are for the voice (svbatch.speech.chosen_layers)."""

    graph: FileName
    width: PositiveInt
    voice_width: PositiveInt | None = None
    frames_per_second: PositiveInt | PositiveFloat
    window_seconds: PositiveInt
    external_data: FileName | None


class VoiceActivityPart(_Part):
    """silero-vad's graph over a whole waveform (see svbatch.speech.voice_activity)."""

    graph: FileName


class RecogniserPart(_Part):
    weights: FileName
    tokenizer: FileName


class ProjectorPart(_Part):
    graph: FileName
    weights: FileName
    config: dict[str, Any]


class LanguageModelPart(_Part):
    """`weights`: a GGUF file, or with `config` the first file of a model in transformers' format, `more_weights` being
    the others."""

    weights: FileName
    tokenizer: FileName
    config: FileName | None = None
    more_weights: list[FileName] | None = None

    @property
    def shards(self) -> list[str]:
        """All files of its weights."""
        return [self.weights, *(self.more_weights or [])]


class AdapterPart(_Part):
    weights: FileName
    config: dict[str, Any]


class Calibration(_Part):
    """How a closed task's scores become probabilities: score / temperature, of a label after habit * what the LLM gives
    it when it has heard nothing is taken off. Where words are spotted, the log-odds of yes also gain bias +
    spotting * the read-out's evidence + written * the transcript's; where the projector reads a task's labels from the
    voice, a label's score also gains voice * its log-probability there. labels: those that it was fitted on, where they
    are not the library's."""

    temperature: PositiveFloat
    habit: float = 0.0
    spotting: float = 0.0
    written: float = 0.0
    bias: float = 0.0
    voice: float = 0.0
    labels: list[str] = []


class Manifest(_Part):
    """bundle.json, key by key. A part that a bundle does not have is null; only `voice_activity` may be left out.

    `calibration`: by task name. `recipe`, `data`, `figures`, `not_for`: how it was made, from
    what, how good it measured, what it must not be used for; these change no answer and are not in the id.
    """

    name: FileName
    version: str
    description: str
    encoder: EncoderPart
    voice_activity: VoiceActivityPart | None = None
    recogniser: RecogniserPart | None
    projector: ProjectorPart | None
    readout: dict[str, Any]
    llm: LanguageModelPart
    adapter: AdapterPart | None
    calibration: dict[str, Calibration]
    files: dict[FileName, FileEntry]
    fetched: dict[FileName, FetchedEntry]
    recipe: dict[str, Any]
    data: list[dict[str, Any]]
    figures: dict[str, Any]
    not_for: str

    @model_validator(mode="after")
    def _every_part_is_listed(self) -> Self:
        parts = {
            "encoder": [self.encoder.graph],
            "voice_activity": [self.voice_activity.graph] if self.voice_activity else [],
            "recogniser": [self.recogniser.weights, self.recogniser.tokenizer] if self.recogniser else [],
            "projector": [self.projector.graph, self.projector.weights] if self.projector else [],
            "llm": [*self.llm.shards, self.llm.tokenizer, *([self.llm.config] if self.llm.config else [])],
            "adapter": [self.adapter.weights] if self.adapter else [],
        }
        known = self.files.keys() | self.fetched.keys()
        unlisted = [f"{name} ({part})" for part, names in parts.items() for name in names if name not in known]
        if unlisted:
            raise ValueError(f"neither `files` nor `fetched` lists {', '.join(unlisted)}")
        if twice := sorted(self.files.keys() & self.fetched.keys()):
            raise ValueError(f"{', '.join(twice)} stands in both `files` and `fetched`; keep one")
        return self


@dataclass(frozen=True)
class Bundle:
    """`ref` is how a command names it (a shipped name or a folder); `cache_option` is what --cache said, None
    if nothing."""

    ref: str
    folder: Path
    manifest: Manifest
    cache_option: Path | None

    @property
    def cache(self) -> Path:
        """The cache folder; BundleError if there is no place for one (svbatch.cache.cache_dir)."""
        return cache_dir(self.cache_option)

    @property
    def id(self) -> str:
        """16 hex digits over all that can change an answer: every file's hash, every part's settings."""
        settings = self.manifest.model_dump(
            include={"encoder", "voice_activity", "recogniser", "projector", "readout", "llm", "adapter", "calibration"}
        )
        # A key that came later, and is not used, leaves an older bundle's id as it was.
        if self.manifest.llm.config is None:
            settings["llm"] = {key: settings["llm"][key] for key in ("weights", "tokenizer")}
        if self.manifest.encoder.voice_width is None:
            del settings["encoder"]["voice_width"]
        for fitted in settings["calibration"].values():
            for key in ("voice", "written", "labels", "habit"):
                if not fitted[key]:
                    del fitted[key]
        entries = {**self.manifest.files, **self.manifest.fetched}
        settings["sha256"] = {name: entry.sha256 for name, entry in entries.items()}
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def path(self, name: str) -> Path:
        """The file on disk, of the size that bundle.json says; else BundleError with name and remedy."""
        path, entry = self._locate(name)
        if problem := _size_problem(path, entry):
            raise BundleError(f"bundle {self.ref}: {name}: {problem}; {self._remedy(name)}")
        return path

    def check(self) -> list[str]:
        """Every problem of every file, one line each, empty if all is well; reads and hashes everything."""
        return [*self.check_folder(), *self._problems(self.manifest.fetched)]

    def check_folder(self) -> list[str]:
        """`check` for the files that lie in the bundle's own folder."""
        return self._problems(self.manifest.files)

    def _problems(self, names: Mapping[str, FileEntry]) -> list[str]:
        problems = []
        for name in names:
            path, entry = self._locate(name)
            if problem := _size_problem(path, entry) or hash_differs(path, entry.sha256):
                problems.append(f"{name}: {problem}; {self._remedy(name)}")
        return problems

    def _locate(self, name: str) -> tuple[Path, FileEntry]:
        if name in self.manifest.files:
            return self.folder / name, self.manifest.files[name]
        if name in self.manifest.fetched:
            fetched = self.manifest.fetched[name]
            return cached_file(self.cache, fetched.sha256, name), fetched
        known = ", ".join([*self.manifest.files, *self.manifest.fetched])
        raise BundleError(f"bundle {self.ref} has no file {name}; {MANIFEST_NAME} lists {known}")

    def _remedy(self, name: str) -> str:
        if name in self.manifest.files:
            origin = "install svbatch" if self.folder.parent == SHIPPED_DIR else "copy the bundle"
            return f"{origin} again"
        path, _ = self._locate(name)
        delete = f"delete {path} and " if path.exists() else ""
        return f"{delete}run `svbatch bundle fetch {self.ref}`"


def shipped_bundles() -> list[str]:
    """Names of the bundles that are installed with svbatch, in order."""
    return sorted(path.parent.name for path in SHIPPED_DIR.glob(f"*/{MANIFEST_NAME}"))


def find_bundle(name_or_path: str, *, base: Path = Path(), cache: Path | None = None) -> Bundle:
    """The bundle of that shipped name, or else in that folder (relative to `base`), its own files hashed.

    BundleError if there is none, or with the name of each file that is missing or not what bundle.json says.
    `cache` is what --cache said, None if nothing.
    """
    bundle = read_bundle(name_or_path, base=base, cache=cache)
    if problems := bundle.check_folder():
        raise BundleError(f"bundle {bundle.ref}: {'; '.join(problems)}")
    return bundle


def read_bundle(name_or_path: str, *, base: Path = Path(), cache: Path | None = None) -> Bundle:
    """`find_bundle` without a look at the files: for showing and checking a bundle that may be damaged."""
    if name_or_path in shipped_bundles():
        folder = SHIPPED_DIR / name_or_path
        return Bundle(name_or_path, folder, _read_manifest(folder / MANIFEST_NAME), cache)
    folder = (base / name_or_path).absolute()
    if not folder.is_dir():
        known = ", ".join(shipped_bundles()) or "none"
        raise BundleError(
            f"bundle {name_or_path}: svbatch ships no bundle of this name (it ships: {known}) and there is "
            f"no folder {folder}; name one that is shipped, or a folder that holds {MANIFEST_NAME}"
        )
    return Bundle(str(folder), folder, _read_manifest(folder / MANIFEST_NAME), cache)


def describe_file(path: Path, licence: str) -> FileEntry:
    """What bundle.json says of a file: its sha256, size and licence."""
    return FileEntry(sha256=_sha256_of(path), size_bytes=path.stat().st_size, licence=licence)


def write_bundle(folder: Path, fields: Mapping[str, Any], licences: Mapping[str, str]) -> Bundle:
    """Writes folder/bundle.json from `fields` (all its keys but `files`), hashing the files in the folder
    that `licences` names (file name -> licence). BundleError, and nothing written, if a key is wrong.
    """
    files = {name: describe_file(folder / name, licence).model_dump() for name, licence in licences.items()}
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate({**fields, "files": files})
    except ValidationError as error:
        raise BundleError(_explain(path, error)) from error
    draft = path.with_name(f".{MANIFEST_NAME}.partial")
    draft.write_text(manifest.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return read_bundle(str(folder.absolute()))


def hash_differs(path: Path, sha256: str) -> str | None:
    """None if the file's bytes have this hash, else both hashes, short, or why it cannot be read."""
    try:
        found = _sha256_of(path)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None if found == sha256 else f"sha256 is {found[:12]}…, expected {sha256[:12]}…"


def _read_manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        problem = f"{path}: cannot be read: {error.strerror}; a bundle is a folder with this file"
        raise BundleError(problem) from error
    except ValidationError as error:
        raise BundleError(_explain(path, error)) from error


def _explain(path: Path, error: ValidationError) -> str:
    problems = []
    for found in error.errors(include_url=False, include_context=False):
        where = ".".join(str(step) for step in found["loc"])
        message = "unknown key; remove it" if found["type"] == "extra_forbidden" else found["msg"]
        problems.append(f"{where}: {message}" if where else message)
    return f"{path}: {'; '.join(problems)}"


def _size_problem(path: Path, entry: FileEntry) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size_bytes = path.stat().st_size
    return None if size_bytes == entry.size_bytes else f"has {size_bytes} bytes, expected {entry.size_bytes}"


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
