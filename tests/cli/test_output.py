"""svbatch status, verify, compact, forget and migrate, as a user calls them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from batches import asr, commit, recordings, sha256, texts
from click.testing import CliRunner

from svbatch.cli import main
from svbatch.errors import BusyError, DamageError, OutputError
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store

ROOT = Path(__file__).parents[2]


def call(*arguments):
    """What a command prints; its error is raised."""
    result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=True)
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def output(tmp_path):
    """Two recordings that are files, and one that is not."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.wav").write_text(name)
    store = Store(tmp_path / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        commit(store, {f"{tmp_path}/a.wav": "a", f"{tmp_path}/b.wav": "b"})
        commit(store, {"s3://bucket/c.wav": "c"})
        store.tidy()
    return store.output


def test_status_says_what_is_there(output):
    lines = call("status", output).splitlines()
    assert lines[0] == f"{output}: 3 recordings, 0.0 hours, 3 annotated"
    assert lines[2].split() == ["table", "rows", "files", "MB", "answered"]
    assert lines[3].split() == ["asr", "6", "3", "0.0", "3", "of", "3"]


def test_verify_is_silent_but_for_a_line_where_all_is_whole_and_names_every_problem_else(output):
    assert call("verify", output) == f"{output} is whole\n"
    path = max((output / "asr").glob("*.parquet"))
    path.unlink()
    (output / "failures" / "part-x.parquet").write_bytes(b"x")
    with pytest.raises(DamageError, match=f"2 problems\nasr/{path.name}: missing") as raised:
        call("verify", output)
    assert raised.value.exit_code == 4


def test_verify_says_how_many_files_have_no_hash_and_takes_that_for_no_damage(output):
    for path in (output / "_hashes" / "asr").iterdir():
        path.unlink()
    said = "3 files have no hash to compare with yet; the next run writes it, or `svbatch compact`"
    assert call("verify", output) == f"{output} is whole\n{said}\n"


def test_verify_exits_with_4(output):
    next((output / "asr").glob("*.parquet")).write_bytes(b"")
    ended = subprocess.run(
        [sys.executable, "-m", "svbatch", "verify", output], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 4
    assert ended.stderr.startswith(f"svbatch: {output}: 1 problem\nasr/")


def test_compact_makes_few_files_of_many(output):
    assert "asr                        3 files -> 1" in call("compact", output)
    assert len(list((output / "asr").glob("*.parquet"))) == 1
    assert len(texts(Store(output))) == 6


def test_forget_takes_paths_uris_and_hashes_and_unforget_files_and_hashes(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("forget", "out", "a.wav", "s3://bucket/c.wav") == f"forgotten:\n{tmp_path}/a.wav\ns3://bucket/c.wav\n"
    assert call("forget", "out", sha256("b")) == f"forgotten:\n{tmp_path}/b.wav\n"
    assert Store(output).forgotten() == {sha256(name) for name in "abc"}
    call("forget", "out", "--unforget", "a.wav", sha256("c"))
    assert Store(output).forgotten() == {sha256("b")}
    with pytest.raises(OutputError, match=rf"no recording is known as '{tmp_path}/no.wav'"):
        call("forget", "out", "no.wav")


@pytest.mark.parametrize("command", [["compact"], ["forget"], ["migrate"]])
def test_what_changes_an_output_is_busy_while_a_run_or_shard_writes(output, tmp_path, command):
    (tmp_path / "job.yaml").write_text("corpus: a.wav\ntasks: [asr]\noutput: out/\n")
    arguments = {"compact": [output], "forget": [output, tmp_path / "a.wav"], "migrate": [tmp_path / "job.yaml"]}
    for shard in (None, "1/2"):
        with Store(output).lock(shard=shard), pytest.raises(BusyError) as raised:
            call(*command, *arguments[command[0]])
        assert raised.value.exit_code == 75


def test_migrate_brings_an_older_output_up_to_date(output, tmp_path):
    (tmp_path / "job.yaml").write_text("corpus: a.wav\ntasks: [asr]\noutput: out/\n")
    assert call("migrate", tmp_path / "job.yaml") == "every table has its columns already\n"
    shutil.rmtree(output / "recordings")
    store = Store(output)
    rows = recordings({f"{tmp_path}/a.wav": "a"}).drop_columns(["etag"])
    store.tables.make("recordings", rows.schema)
    store.tables.append("recordings", rows)
    with pytest.raises(OutputError, match=rf"`svbatch migrate {tmp_path}/job.yaml --output {output}` brings"):
        store.prepare({"asr": asr({}).schema}, job=tmp_path / "job.yaml")
    assert call("migrate", tmp_path / "job.yaml", "--output", output) == "recordings has the new columns\n"
    assert store.read("recordings")["etag"].to_pylist() == [None]


@pytest.mark.parametrize("command", ["status", "verify", "compact"])
def test_an_output_that_is_not_there_is_refused_and_not_made(tmp_path, command):
    with pytest.raises(OutputError, match="there is no such folder"):
        call(command, tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


def test_reading_commands_change_nothing(output):
    def state():
        return sorted((path, path.stat().st_mtime_ns) for path in output.rglob("*"))

    before = state()
    call("status", output)
    call("verify", output)
    assert state() == before


def test_looking_after_an_output_imports_no_model():
    code = "import sys, svbatch.cli.output, svbatch.tables.verify, svbatch.tables.migrate; "
    code += "sys.exit({'torch', 'transformers'} & set(sys.modules) or 0)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_hold_what_parquet_readers_expect(output):
    for path in output.glob("*/*.parquet"):
        assert pq.read_schema(path).names
