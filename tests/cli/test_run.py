import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from svbatch.bundle import Bundle
from svbatch.cli import entry, main
from svbatch.tables.store import Store

JOB = "corpus: recordings/\ntasks: [asr, speech_activity]\noutput: out/\nbundle: {bundle}\nprecision: float32\n"


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`svbatch` as a process of its own, its standard error no terminal."""
    line = [sys.executable, "-m", "svbatch", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment}, check=False)


@pytest.fixture
def call(monkeypatch, capsys):
    """call("run", job) -> exit code, standard output, standard error: `svbatch` within this process."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def entered(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["svbatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            entry()
        return left.value.code, *capsys.readouterr()

    return entered


@pytest.fixture
def job(tmp_path, corpus_dir, tiny_bundle) -> Path:
    """A job of one short recording."""
    (tmp_path / "recordings").mkdir()
    shutil.copy(corpus_dir / "short.flac", tmp_path / "recordings")
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(bundle=tiny_bundle.folder))
    return path


@pytest.fixture
def options(tiny_bundle) -> list[object]:
    return ["--cache", tiny_bundle.cache]


def test_a_job_is_answered_once_and_then_nothing_is_new(job, options):
    said = command("run", job, *options)
    assert said.returncode == 0, said.stderr
    assert "1 recordings: 1 annotated" in said.stdout
    assert f"tables: {job.parent}/out" in said.stdout
    lines = [json.loads(line) for line in said.stderr.splitlines() if line.startswith("{")]
    assert [line["message"].split()[0] for line in lines] == ["loading", "committed"]
    assert len({line["run_id"] for line in lines}) == 1
    assert lines[1]["recordings"] == 1
    code = (
        "import sys\nfrom svbatch.cli import entry\n"
        "try: entry()\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules, 'onnxruntime' in sys.modules)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, "run", job, *options], capture_output=True, text=True, check=True
    )
    *lines, last = again.stdout.splitlines()
    assert lines == [f"nothing new: all 1 recordings have their answers in {job.parent}/out"]
    assert last == "0 False False"
    assert again.stderr == ""


def test_a_broken_file_is_a_row_of_failures_and_exit_3(job, options, call, corpus_dir):
    (job.parent / "recordings" / "broken.wav").write_text("no sound")
    shutil.copy(corpus_dir / "silent.wav", job.parent / "recordings")
    code, out, _ = call("run", job, *options)
    assert code == 3
    assert "3 recordings: 1 annotated, 1 without speech, 1 failed, 0 unchanged" in out
    store = Store(job.parent / "out")
    [failure] = store.read("failures").to_pylist()
    assert (failure["stage"], Path(failure["uri"]).name) == ("decode", "broken.wav")
    heard = {Path(uri).name for uri in store.read("speech_activity")["uri"].to_pylist()}
    assert heard == {"short.flac", "silent.wav"}
    code, out, _ = call("run", job, *options)
    assert (code, out.count("nothing new")) == (0, 1)


def test_quiet_says_nothing_on_success(job, options, call):
    assert call("run", job, *options, "--quiet") == (0, "", "")
    assert call("run", job, *options, "--quiet") == (0, "", "")


def test_quiet_says_a_line_for_each_kind_of_failure(job, options, call):
    for name in ("one.wav", "two.wav"):
        (job.parent / "recordings" / name).write_text("no sound")
    (job.parent / "recordings" / "three.wav").touch()
    code, out, err = call("run", job, *options, "--quiet")
    assert (code, out) == (3, "")
    lines = [json.loads(line) for line in err.splitlines()]
    assert [(line["level"], line["code"], line["failures"]) for line in lines] == [
        ("warning", "empty", 1),
        ("warning", "no_audio", 2),
    ]
    assert "one.wav holds no audio" in lines[1]["message"]


def test_a_dry_run_says_what_would_be_asked(job, options):
    said = CliRunner().invoke(main, ["run", str(job), *map(str, options), "--dry-run"])
    assert (said.exit_code, said.stderr) == (0, "")
    assert said.stdout.startswith("to ask: 1 recordings, 0.00 hours of audio, 2 questions")
    assert not (job.parent / "out").exists()


def test_metrics_are_written_and_a_place_where_they_cannot_be_is_refused_first(job, options, call, tmp_path):
    code, _, err = call("run", job, *options, "--metrics", tmp_path / "no" / "svbatch.prom")
    assert (code, (tmp_path / "out").exists()) == (2, False)
    assert "metrics cannot be written there" in err
    code, _, _ = call("run", job, *options, "--quiet", "--metrics", tmp_path / "svbatch.prom")
    assert code == 0
    assert 'svbatch_recordings{job="job",outcome="annotated"} 1.0' in (tmp_path / "svbatch.prom").read_text()


def test_a_wrong_value_of_an_option_is_exit_2(job, options, call):
    code, _, err = call("run", job, *options, "--shard", "5/4")
    assert code == 2
    assert "'5/4' is no shard; write 1/4" in err


def test_corpus_and_output_can_be_given_for_a_script(job, options, call, corpus_dir, tmp_path):
    code, out, _ = call("run", job, *options, "--corpus", corpus_dir / "silent.wav", "--output", tmp_path / "other")
    assert code == 0
    assert "1 recordings: 0 annotated, 1 without speech" in out
    assert (tmp_path / "other" / "speech_activity").is_dir()
    assert not (tmp_path / "out").exists()


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest(job, options, call):
    job.write_text(job.read_text().replace("tasks:", "taks:"))
    code, out, err = call("run", job, *options)
    assert (code, out) == (2, "")
    assert f"{job}, line 2: unknown key `taks`; did you mean `tasks`?" in err
    assert "Traceback" not in err


def test_two_errors_are_both_shown_each_with_its_line(job, options, call):
    job.write_text(job.read_text().replace("float32", "float8").replace("[asr,", "[asr, asrr,"))
    code, _, err = call("run", job, *options)
    assert code == 2
    assert f"{job}, line 2: unknown task `asrr`; did you mean `asr`?" in err
    assert f"{job}, line 5: `precision` is `float8`; choose auto, float32 or bfloat16" in err


def test_a_job_that_is_not_there_is_named(options, call, tmp_path):
    code, _, err = call("run", tmp_path / "nightly.yaml", *options)
    assert code == 2
    assert f"{tmp_path}/nightly.yaml: no such file" in err


def test_a_corpus_without_audio_is_named_with_what_was_looked_for(job, options, call):
    (job.parent / "recordings" / "short.flac").rename(job.parent / "recordings" / "notes.txt")
    code, _, err = call("run", job, *options)
    assert code == 2
    assert "no recording in" in err
    assert ".flac" in err


def test_an_output_that_cannot_be_written_is_named(job, options, call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = call("run", job, *options, "--output", tmp_path / "file" / "out")
    assert code == 2
    assert f"{tmp_path}/file/out: the tables cannot be written there" in err


def test_a_flipped_byte_of_the_bundle_is_found_and_its_file_named(job, options, call, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle.folder, tmp_path / "damaged")
    graph = tmp_path / "damaged" / "projector.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    job.write_text(JOB.format(bundle="./damaged"))
    code, _, err = call("run", job, *options)
    assert code == 2
    assert "projector.onnx: sha256 is" in err
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_does_not_exist_lists_those_that_do(job, options, call):
    job.write_text(JOB.format(bundle="minni"))
    code, _, err = call("run", job, *options)
    assert code == 2
    assert "bundle minni: svbatch ships no bundle of this name (it ships: mini)" in err


def test_an_output_in_use_is_exit_75(job, options, call):
    with Store(job.parent / "out").lock():
        code, _, err = call("run", job, *options)
    assert code == 75
    assert f"process {os.getpid()} is writing there; try again" in err


def test_weights_that_cannot_be_fetched_are_exit_2_with_the_remedy(job, call, tiny_bundle: Bundle, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(tiny_bundle.folder, folder)
    manifest = json.loads((folder / "bundle.json").read_text())
    manifest["fetched"]["llm.gguf"]["from"] = [f"file:{tmp_path}/gone.gguf"]
    (folder / "bundle.json").write_text(json.dumps(manifest))
    job.write_text(JOB.format(bundle="./moved"))
    code, _, err = call("run", job, "--cache", tmp_path / "cache")
    assert code == 2
    assert f"llm.gguf could not be fetched: file:{tmp_path}/gone.gguf: No such file or directory" in err
    assert "svbatch bundle fetch" in err


def test_an_error_off_a_terminal_is_a_json_line_with_the_runs_id_if_one_had_begun(job, options, call):
    with Store(job.parent / "out").lock():
        _, _, busy = call("run", job, *options)
    _, _, unknown = call("run", job, *options, "--quite")
    job.write_text(job.read_text().replace("tasks:", "taks:").replace("float32", "float8"))
    _, _, misspelt = call("run", job, *options)
    lines = [json.loads(line) for line in (busy, unknown, misspelt)]
    assert [line["level"] for line in lines] == ["error"] * 3
    assert ["run_id" in line for line in lines] == [True, False, False]
    assert "is writing there" in lines[0]["message"]
    assert len(lines[2]["message"].splitlines()) == 3


def test_an_error_on_a_terminal_is_text(call, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    _, _, err = call("run", tmp_path / "nightly.yaml")
    assert err.startswith(f"svbatch: {tmp_path}/nightly.yaml: no such file")


def test_help_has_an_example_and_every_option():
    said = CliRunner().invoke(main, ["run", "--help"])
    assert said.exit_code == 0
    assert "Example:  svbatch run jobs/quickstart.yaml" in said.output
    for option in (
        *("--corpus", "--output", "--cache", "--quiet", "--since", "--limit", "--shard", "--max-runtime"),
        *("--max-failure-rate", "--retry-failures", "--rehash", "--dry-run", "--metrics"),
    ):
        assert option in said.output


def test_an_unknown_option_is_exit_2(call):
    code, _, err = call("run", "job.yaml", "--quite")
    assert code == 2
    assert "--quiet" in err


def test_help_is_quick_and_loads_no_torch():
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    said = command("--help", PYTHONPROFILEIMPORTTIME="1")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2.0  # of the processor, not of the clock
    assert said.returncode == 0
    assert "Answer a job's tasks" in said.stdout
    imported = {line.split("|")[-1].strip() for line in said.stderr.splitlines() if line.startswith("import time:")}
    assert "click" in imported
    assert not imported & {"torch", "numpy", "transformers", "deltalake", "onnxruntime"}
