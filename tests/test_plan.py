import os
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.corpus.recording import EPOCH, Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError
from svbatch.plan import (
    RECORDINGS_PER_BATCH,
    Batch,
    Selection,
    answer_settings,
    content_hash,
    iter_batches,
    shard_of,
    task_key,
)
from svbatch.recorded import COLUMNS, read_recorded
from svbatch.tables.schemas import arrow_schema
from svbatch.tasks.task import Task, load_task, task_version

SCHEMA = pa.schema([arrow_schema("recordings").field(name) for name in COLUMNS])


def row_of(recording: Recording, answered: list[str], **other: object) -> dict[str, object]:
    """What `recordings` says of a recording that is answered."""
    return {
        "uri": recording.uri,
        "recording_id": "0" * 64,
        "size_bytes": recording.size_bytes,
        "modified_at": recording.modified_at,
        "etag": recording.etag,
        "span_start": None,
        "duration": 1.0,
        "status": "annotated",
        "answered": answered,
    } | other


@dataclass(frozen=True)
class Plan:
    """A plan, made whole."""

    batches: tuple[Batch, ...]
    num_unchanged: int

    @property
    def num_recordings(self) -> int:
        return sum(len(batch.recordings) for batch in self.batches)


def plan_of(recordings, tasks, versions, rows, selection=Selection()) -> Plan:  # noqa: B008 (frozen)
    counts: Counter[str] = Counter()
    recorded = read_recorded(pa.Table.from_pylist(rows, schema=SCHEMA).to_batches(max_chunksize=2))
    batches = tuple(iter_batches(recordings, tasks, versions, recorded, counts, selection))
    return Plan(batches, counts["unchanged"])


@dataclass
class Output:
    """A corpus in a folder and what an output says of it."""

    corpus: Path
    bundle_id: str = "bundle"

    def versions(self, tasks: list[Task]) -> dict[str, str]:
        return {task.name: task_version(task, self.bundle_id, answer_settings(task, "mix")) for task in tasks}

    def answered(self, tasks: list[Task]) -> list[dict[str, object]]:
        """The rows of `recordings` once all `tasks` have been answered for all recordings."""
        keys = [task_key(task, self.versions(tasks)) for task in tasks]
        return [row_of(recording, keys) for recording in iter_recordings([str(self.corpus)], self.corpus)]

    def plan(self, tasks: list[Task], rows: list[dict[str, object]], **selection: object) -> Plan:
        recordings = iter_recordings([str(self.corpus)], self.corpus)
        return plan_of(recordings, tasks, self.versions(tasks), rows, Selection(**selection))


def asked(plan: Plan) -> dict[str, list[str]]:
    """The names of the tasks asked, by name of recording."""
    return {r.uri.rsplit("/", 1)[-1]: [task.name for task in b.tasks] for b in plan.batches for r in b.recordings}


def tasks(*entries: object) -> list[Task]:
    return [load_task(entry, Path()) for entry in entries]


def keywords(*words: str) -> dict[str, object]:
    return {"keyword_search": {"keywords": list(words)}}


@pytest.fixture
def output(tmp_path) -> Output:
    for name in ("a.wav", "b.wav", "c.ogg"):
        (tmp_path / name).write_bytes(b"sound of " + name.encode())
    return Output(tmp_path)


def test_a_new_output_is_asked_everything(output):
    wanted = tasks("asr", "speech_activity")
    plan = output.plan(wanted, [])
    assert asked(plan) == {name: ["asr", "speech_activity"] for name in ("a.wav", "b.wav", "c.ogg")}
    assert (plan.num_recordings, plan.num_unchanged) == (3, 0)
    assert all(kept == [] for batch in plan.batches for kept in batch.kept.values())


def test_nothing_new_is_asked_nothing(output):
    wanted = tasks("asr", keywords("rain"))
    plan = output.plan(wanted, output.answered(wanted))
    assert plan == Plan((), 3)


def test_the_order_of_a_jobs_tasks_asks_nothing_anew(output):
    recorded = output.answered(tasks("asr", "speech_activity"))
    assert output.plan(tasks("speech_activity", "asr"), recorded).batches == ()


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_asked_everything_and_keeps_nothing(output, change):
    wanted = tasks("asr", "speech_activity")
    recorded = output.answered(wanted)
    path = output.corpus / "b.wav"
    if change == "size":
        before = path.stat()
        path.write_bytes(path.read_bytes() + b"!")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, (1, 1))
    plan = output.plan(wanted, recorded)
    assert asked(plan) == {"b.wav": ["asr", "speech_activity"]}
    assert plan.num_unchanged == 2
    assert plan.batches[0].kept == {plan.batches[0].recordings[0].uri: []}


def test_a_new_task_is_asked_alone_and_the_others_answers_are_kept(output):
    recorded = output.answered(tasks("asr"))
    plan = output.plan(tasks("asr", "speech_activity"), recorded)
    assert set(map(tuple, asked(plan).values())) == {("speech_activity",)}
    [batch] = plan.batches
    assert set(map(tuple, batch.kept.values())) == {(f"asr@{output.versions(tasks('asr'))['asr']}",)}


def test_changed_keywords_are_another_version_and_take_the_place_of_the_old(output):
    old, new = tasks("asr", keywords("rain")), tasks("asr", keywords("rain", "train"))
    assert output.versions(old)["keyword_search"] != output.versions(new)["keyword_search"]
    assert output.versions(old)["asr"] == output.versions(new)["asr"]
    plan = output.plan(new, output.answered(old))
    assert set(map(tuple, asked(plan).values())) == {("keyword_search",)}
    assert all(kept == [f"asr@{output.versions(old)['asr']}"] for kept in plan.batches[0].kept.values())


def test_another_bundle_asks_everything_anew(output):
    wanted = tasks("asr", "speech_activity")
    recorded = output.answered(wanted)
    output.bundle_id = "another"
    plan = output.plan(wanted, recorded)
    assert plan.num_recordings == 3
    assert set(map(tuple, plan.batches[0].kept.values())) == {()}


def test_answers_of_a_task_that_the_job_no_longer_has_are_kept(output):
    recorded = output.answered(tasks("asr", "speech_activity"))
    assert output.plan(tasks("asr"), recorded).batches == ()
    [batch] = output.plan(tasks("asr", keywords("rain")), recorded).batches
    kept = [key.split("@")[0] for key in next(iter(batch.kept.values()))]
    assert kept == ["asr", "speech_activity"]


def test_recordings_that_lack_the_same_share_batches_of_a_limited_size(output):
    for number in range(40):
        (output.corpus / f"more{number}.wav").write_bytes(b"more")
    plan = output.plan(tasks("asr"), [])
    assert [len(batch.recordings) for batch in plan.batches] == [RECORDINGS_PER_BATCH, 43 - RECORDINGS_PER_BATCH]


def test_a_recording_that_is_gone_is_not_planned(output):
    recorded = output.answered(tasks("asr"))
    (output.corpus / "a.wav").unlink()
    assert output.plan(tasks("asr"), recorded) == Plan((), 2)


def test_an_etag_wins_where_both_sides_have_one():
    old = Recording("/a", Path("/a"), 5, EPOCH + timedelta(days=1), etag="x")
    wanted = tasks("asr")
    versions = {"asr": "1"}
    rows = [row_of(old, ["asr@1"])]
    touched = Recording("/a", Path("/a"), 6, EPOCH + timedelta(days=2), etag="x")
    other = Recording("/a", Path("/a"), 5, old.modified_at, etag="y")
    silent = Recording("/a", Path("/a"), 5, old.modified_at)
    unlike = Recording("/a", Path("/a"), 6, old.modified_at)
    is_asked = [bool(plan_of([each], wanted, versions, rows).batches) for each in (touched, other, silent, unlike)]
    assert is_asked == [False, True, False, True]


def test_since_leaves_out_what_is_older_but_not_what_has_no_time(output):
    os.utime(output.corpus / "a.wav", (0, 0))
    os.utime(output.corpus / "b.wav", (1_000_000, 1_000_000))
    plan = output.plan(tasks("asr"), [], since=datetime(2020, 1, 1, tzinfo=UTC))
    assert (sorted(asked(plan)), plan.num_unchanged) == (["a.wav", "c.ogg"], 0)  # time 0 is that of an unknown one


def test_at_most_limit_recordings_are_asked_and_only_what_was_looked_at_counts(output):
    plan = output.plan(tasks("asr"), output.answered(tasks("asr"))[:1], limit=1)
    assert (list(asked(plan)), plan.num_unchanged) == (["b.wav"], 1)


def test_rehash_finds_other_bytes_behind_the_same_size_and_time(output):
    wanted = tasks("asr")
    rows = output.answered(wanted)
    for row, recording in zip(rows, iter_recordings([str(output.corpus)], output.corpus), strict=True):
        row["recording_id"] = content_hash(recording)
    before = (output.corpus / "b.wav").stat()
    (output.corpus / "b.wav").write_bytes(b"SOUND OF b.wav")
    os.utime(output.corpus / "b.wav", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert asked(output.plan(wanted, rows)) == {}
    assert asked(output.plan(wanted, rows, rehash=True)) == {"b.wav": ["asr"]}


def test_forgotten_bytes_are_not_asked_under_any_name(output):
    (output.corpus / "d.wav").write_bytes((output.corpus / "a.wav").read_bytes())
    [first, *_] = iter_recordings([str(output.corpus)], output.corpus)
    plan = output.plan(tasks("asr"), [], forgotten=frozenset({content_hash(first)}))
    assert (sorted(asked(plan)), plan.num_unchanged) == (["b.wav", "c.ogg"], 2)


def test_a_failed_recording_is_done_until_it_is_retried(output):
    wanted = tasks("asr", "speech_activity")
    rows = output.answered(wanted)
    rows[1] |= {"status": "failed", "recording_id": None, "duration": None}
    assert output.plan(wanted, rows).batches == ()
    versions = output.versions(wanted)
    plan = output.plan(wanted, rows, retry={rows[1]["uri"]: {task_key(wanted[1], versions)}})
    assert asked(plan) == {"b.wav": ["speech_activity"]}
    assert list(plan.batches[0].kept.values()) == [[task_key(wanted[0], versions)]]


def test_bytes_that_are_answered_are_known_but_for_spans_and_what_failed(output):
    recordings = list(iter_recordings([str(output.corpus)], output.corpus))
    rows = [row_of(recording, ["asr@1", "x@1"], recording_id=str(n)) for n, recording in enumerate(recordings)]
    more = [
        row_of(recordings[0], ["asr@1"], uri="/span", recording_id="span", span_start=1.0),
        row_of(recordings[0], ["asr@1"], uri="/failed", recording_id=None, status="failed"),
        row_of(recordings[0], ["x@1"], uri="/other", recording_id="other task"),
    ]
    recorded = read_recorded(pa.Table.from_pylist([*rows, *more], schema=SCHEMA).to_batches(max_chunksize=2))
    assert recorded.ids_answered(["asr@1"], besides=[]) == {"0", "1", "2"}
    assert recorded.ids_answered(["asr@1", "x@1"], besides=[recordings[1].uri]) == {"0", "2"}
    assert read_recorded([]).ids_answered(["asr@1"], besides=[]) == frozenset()


NAMES = [*(f"/{name}.wav" for name in "abcdefgh"), "/a.wav#t=0,1", "/a.wav#t=1,2", "/é%FF.wav"]
VERSIONED = st.lists(st.sampled_from(["asr@1", "asr@2", "speech_activity@1", "keywords@1", "own@7"]), unique=True)


@settings(deadline=None)
@given(
    listed=st.lists(st.sampled_from(NAMES), unique=True),
    held=st.dictionaries(st.sampled_from(NAMES), st.tuples(VERSIONED, st.booleans())),
    names=st.lists(st.sampled_from(["asr", "speech_activity", "keywords"]), unique=True, min_size=1),
    num_shards=st.integers(1, 4),
)
def test_the_plan_is_exactly_the_missing_pairs_and_shards_part_it(listed, held, names, num_shards):
    """Beside one obvious version of it, recording by recording."""
    wanted, versions = [load_task(name, Path()) for name in names], dict.fromkeys(names, "1")
    recordings = [Recording(uri, Path(uri), len(uri), EPOCH + timedelta(seconds=1)) for uri in listed]
    rows = [
        row_of(Recording(uri, Path(uri), len(uri) + changed, EPOCH + timedelta(seconds=1)), answered)
        for uri, (answered, changed) in held.items()
    ]
    missing: set[tuple[str, str]] = set()
    kept: dict[str, list[str]] = {}
    for uri in listed:
        answered, changed = held.get(uri, ([], False))
        still = [] if changed else answered
        lacking = {name for name in names if f"{name}@1" not in still}
        missing |= {(uri, name) for name in lacking}
        if lacking:
            kept[uri] = [key for key in still if key.split("@")[0] not in lacking]
    plans = [plan_of(recordings, wanted, versions, rows)]
    plans += [
        plan_of(recordings, wanted, versions, rows, Selection(shard=(i + 1, num_shards))) for i in range(num_shards)
    ]
    pairs = [
        [(r.uri, task.name) for batch in plan.batches for r in batch.recordings for task in batch.tasks]
        for plan in plans
    ]
    assert all(len(set(each)) == len(each) for each in pairs)
    assert set(pairs[0]) == missing
    assert sorted(pair for each in pairs[1:] for pair in each) == sorted(pairs[0])
    assert plans[0].num_unchanged == sum(plan.num_unchanged for plan in plans[1:]) == len(listed) - len(kept)
    assert {uri: keys for batch in plans[0].batches for uri, keys in batch.kept.items()} == kept


@given(st.text(), st.floats(0, 9), st.integers(1, 50))
def test_the_spans_of_a_source_are_in_one_shard(source, start, num_shards):
    assert shard_of(f"{source}#t={start},9.5", num_shards) == shard_of(f"{source}#t=0.0,1.0", num_shards)
    assert 1 <= shard_of(source, num_shards) <= num_shards


def test_a_corpus_without_audio_is_an_error(output):
    for path in output.corpus.iterdir():
        path.unlink()
    with pytest.raises(CorpusError, match=r"no recording in .*looked for .*\.wav"):
        output.plan(tasks("asr"), [])
