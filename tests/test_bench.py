from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from svbatch.bench import Run, _added, _added_floor, _answered, _remembered, bench, matrix_speed
from svbatch.cli import main
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError
from svbatch.job import Job, load_job
from svbatch.language.llm import LanguageModel
from svbatch.timing import Spent, count, part, watching


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    """The speed of matrix products is measured before and after every run: of small ones it is as true a number, and
    the large ones took most of these tests' time."""
    monkeypatch.setattr("svbatch.bench.MATRIX", 256)


@pytest.fixture
def job(corpus_dir, tiny_bundle, tmp_path) -> Job:
    path = tmp_path / "job.yaml"
    path.write_text(
        f"corpus: {corpus_dir}\ntasks: [asr, speech_activity, emotion]\noutput: out/\nbundle: {tiny_bundle.folder}\n"
    )
    return load_job(path)


def test_parts_make_up_the_whole_and_every_task_after_the_first_has_a_price(job, tiny_model, tmp_path):
    figures = bench(job, tiny_model, repeats=1)
    names = {each.name for each in figures.parts}
    assert names >= {"decode", "encoder", "projector", "recogniser", "prefill", "scoring", "writing", "the rest"}
    assert sum(each.share for each in figures.parts) == pytest.approx(1.0)
    assert all(each.share >= 0 for each in figures.parts)
    assert [price.task for price in figures.prices] == ["speech_activity", "emotion"]
    assert figures.audio_seconds == pytest.approx(31.0, abs=0.5)
    assert not (tmp_path / "out").exists()


def test_what_a_task_adds_is_not_what_the_same_work_took_more_or_less():
    def run(encoder: float, scoring: float, writing: float, scored: float) -> Run:
        spent = {
            "encoder": Spent(encoder, {"float32": 8e9}),
            "scoring": Spent(scoring, {"bfloat16": scored}),
            "writing": Spent(writing),
        }
        return Run(encoder + scoring + writing + 0.5, spent, 60.0, {"float32": 4e9, "bfloat16": scored})

    less, more = run(10.0, 2.0, 0.1, 1e9), run(11.5, 2.6, 0.2, 1.4e9)
    assert _added(more, less) == pytest.approx(0.7)
    assert _added(more, Run(10.5, {"encoder": less.spent["encoder"]}, 60.0, less.speeds)) == pytest.approx(2.8)
    assert _added_floor(more, less) == pytest.approx(0.4 / 1.2)


def test_what_was_heard_is_asked_again_and_nothing_is_heard(job, tiny_model):
    recordings = list(iter_recordings(job.corpus, job.corpus_base))
    remembered = partial(_remembered, {})
    with watching() as spent:
        seconds = _answered(recordings, job.tasks, tiny_model, remembered)
    with watching() as spent_again:
        assert _answered(recordings, job.tasks, tiny_model, remembered) == seconds
    hearing = {"encoder", "projector", "recogniser"}
    assert hearing <= set(spent)
    assert not hearing & set(spent_again)
    for name in ("prefill", "scoring"):
        assert spent[name].operations == spent_again[name].operations


def test_the_command_prints_a_line_for_each_part_and_price(job, tiny_bundle):
    corpus = str(Path(job.corpus[0]) / "short.flac")
    options = ["--repeats", "1", "--corpus", corpus, "--cache", str(tiny_bundle.cache)]
    result = CliRunner().invoke(main, ["bench", str(job.path), *options], catch_exceptions=False)
    assert result.exit_code == 0
    assert "times real time" in result.output
    assert [line.split()[0] for line in result.output.splitlines()[-2:]] == ["speech_activity", "emotion"]


def test_a_corpus_that_cannot_be_read_is_not_measured(job, tiny_model, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    broken = job.model_copy(update={"corpus": (str(tmp_path / "broken.wav"),)})
    with pytest.raises(CorpusError, match="none of the 1 recordings can be read"):
        bench(broken, tiny_model, repeats=1)


def test_the_operations_of_reading_are_those_of_the_layers_weights(tiny_model):
    llm: LanguageModel = tiny_model.llm
    weights = sum(p.numel() for n, p in llm.model.named_parameters() if ".layers." in n and p.dim() == 2)
    with watching() as spent, part("prefill"):
        llm.read([torch.zeros(10, llm.width)])
    attention = 4 * 2 * llm.width * sum(range(1, 11))  # two layers; position p sees p + 1
    assert spent["prefill"].operations == {"float32": pytest.approx(2 * weights * 10 + attention)}


def test_what_is_done_outside_a_watch_is_not_counted():
    with part("idle"):
        count(5.0, "float32")
    with watching() as spent:
        pass
    assert not spent


def test_parts_do_not_overlap():
    with watching(), part("outer"), pytest.raises(AssertionError, match="inside outer"), part("inner"):
        pass


def test_a_matrix_product_has_a_speed():
    assert matrix_speed(torch.float32) > 1e9


def test_nothing_of_a_folder_without_audio_is_measured(tmp_path, tiny_bundle):
    path = tmp_path / "job.yaml"
    path.write_text(f"corpus: .\ntasks: [asr]\noutput: out/\nbundle: {tiny_bundle.folder}\n")
    with pytest.raises(CorpusError, match="no recording in"):
        CliRunner().invoke(main, ["bench", str(path), "--cache", str(tiny_bundle.cache)], catch_exceptions=False)


def test_no_repeats_are_refused(job):
    assert CliRunner().invoke(main, ["bench", str(job.path), "--repeats", "0"]).exit_code == 2


def test_the_benchmarks_job_asks_thirteen_tasks():
    assert len(load_job(Path(__file__).parents[1] / "bench" / "every_task.yaml").tasks) == 13
