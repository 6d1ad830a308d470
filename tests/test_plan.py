import os
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError
from svbatch.plan import ANSWER_SETTINGS, RECORDINGS_PER_BATCH, Plan, make_plan
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import PLAN_COLUMNS
from svbatch.tasks.task import Task, load_task, task_version


@dataclass
class Output:
    """A corpus of `num_recordings` and what an output says of it."""

    corpus: Path
    bundle_id: str = "bundle"

    def versions(self, tasks: list[Task]) -> dict[str, str]:
        return {task.name: task_version(task, self.bundle_id, ANSWER_SETTINGS) for task in tasks}

    def answered(self, tasks: list[Task]) -> pa.Table:
        """The table `recordings` once all `tasks` have been answered for all recordings."""
        rows = [
            {
                "uri": recording.uri,
                "recording_id": "0" * 64,
                "size_bytes": recording.size_bytes,
                "modified_at": recording.modified_at,
                "answered": [f"{name}@{version}" for name, version in self.versions(tasks).items()],
            }
            for recording in iter_recordings([str(self.corpus)], self.corpus)
        ]
        schema = arrow_schema("recordings")
        return pa.Table.from_pylist(rows, schema=pa.schema([schema.field(name) for name in PLAN_COLUMNS]))

    def plan(self, tasks: list[Task], recorded: pa.Table) -> Plan:
        return make_plan([str(self.corpus)], self.corpus, tasks, self.versions(tasks), recorded)


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
    plan = output.plan(wanted, output.answered(wanted).slice(0, 0))
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
    plan = output.plan(tasks("asr"), output.answered([]).slice(0, 0))
    assert [len(batch.recordings) for batch in plan.batches] == [RECORDINGS_PER_BATCH, 43 - RECORDINGS_PER_BATCH]


def test_a_recording_that_is_gone_is_not_planned(output):
    recorded = output.answered(tasks("asr"))
    (output.corpus / "a.wav").unlink()
    assert output.plan(tasks("asr"), recorded) == Plan((), 2)


def test_a_corpus_without_audio_is_an_error(output):
    for path in output.corpus.iterdir():
        path.unlink()
    with pytest.raises(CorpusError, match=r"no recording in .*looked for .*\.wav"):
        output.plan(tasks("asr"), arrow_schema("recordings").empty_table())
