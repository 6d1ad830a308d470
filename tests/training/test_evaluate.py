"""The whole of `svbatch evaluate` on the tiny bundle: its answers mean nothing, but every one is there and counted."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import soundfile
import torch
from click.testing import CliRunner

from svbatch.ask import ask, read
from svbatch.cli import main
from svbatch.cli.model import evaluate
from svbatch.errors import BundleError, TrainingError
from svbatch.generate import Unanswered, with_transcripts
from svbatch.training.answering import MODES, Answered, answered, heard_batches, in_mode, mode_answers
from svbatch.training.benchmark import Benchmark, Item
from svbatch.training.cascade import cascade_answers, load_cascade
from svbatch.training.evaluate import Systems, answer_all, read_benchmarks
from svbatch.training.figures import figures, wording_spread
from svbatch.training.results import plot

GENDERS = ("female", "male")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, bursts) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    rows = []
    for number in range(6):
        soundfile.write(folder / f"clip{number}.wav", bursts(1.0 + number / 4, seed=number), 16_000)
        rows.append(
            {
                "audio": f"clip{number}.wav",
                "text": f"they went to town {'abcdef'[number] * 5}",
                "speaker": f"s{number // 3}",
                "source": ("calls", "studio")[number % 2],
                "lang": "en",
                "speech": True,
                "gender": GENDERS[number % 2],
                "slots": {"place": "town"},
            }
        )
    soundfile.write(folder / "silent.wav", np.zeros(32_000, np.float32), 16_000)
    rows.append({"audio": "silent.wav", "source": "office", "speech": False})
    path = folder / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def benches(manifest) -> list[Benchmark]:
    return read_benchmarks(manifest, written=False)


@pytest.fixture(scope="module")
def answers(benches, tiny_model, tiny_bundle) -> list[Answered]:
    cascade, _ = load_cascade(tiny_bundle, None, tiny_model, "float32")
    modes = ("audio", "text", "both", "both-no-speech", "both-no-transcript", "joint", "generated")
    return answer_all(benches, tiny_model, Systems(modes, False, cascade, {}))


def of(answers, test, system):
    return {a.item: a for a in answers if (a.test, a.system, a.wording) == (test, system, 0)}


def test_every_system_answers_every_recording_of_what_it_can_be_asked(answers, benches):
    for test in benches:
        both = ("transcript" in test.task.hears) * ["both-no-speech", "both-no-transcript", "joint", "cascade"]
        text = [] if test.name == "speech_activity" else ["text"]
        label = ["generated"] if test.name == "gender" else []
        for system in ["audio", "both", *text, *both, *label]:
            assert set(of(answers, test.name, system)) == set(range(len(test.items))), (test.name, system)
    assert not of(answers, "speech_activity", "text")
    assert not of(answers, "gender", "cascade")


def test_answers_are_plain_values_with_the_probability_of_what_is_said(answers, benches):
    for answer in of(answers, "gender", "both").values():
        assert answer.said in (*GENDERS, None)
        if answer.said:
            assert 0.5 <= answer.confidences[0] <= 1
    asked = next(test for test in benches if test.name == "keyword_search")
    for number, answer in of(answers, "keyword_search", "both").items():
        if answer.said is not None:
            assert answer.said.keys() == asked.items[number].truth.keys()
            assert len(answer.right) == len(answer.confidences) == 2


def test_the_cascade_of_keyword_search_looks_the_word_up_in_the_transcript(benches, tiny_model):
    [batch] = heard_batches([t for t in benches if t.name in ("asr", "keyword_search")], tiny_model)
    found = list(cascade_answers(batch, tiny_model))
    texts = {a.item: a.said for a in found if a.test == "asr"}
    for answer in (a for a in found if a.test == "keyword_search"):
        assert all(present == (word in texts[answer.item].split()) for word, present in answer.said.items())


def test_both_without_speech_reads_what_text_reads(answers):
    """The prompts are the same tokens, so the answers are, where nothing but the LLM has a voice."""
    assert {i: a.said for i, a in of(answers, "slots", "both-no-speech").items()} == {
        i: a.said for i, a in of(answers, "slots", "text").items()
    }


def test_a_task_of_the_sound_alone_has_no_part_to_leave_out(benches):
    gender = next(test for test in benches if test.name == "gender").task
    assert in_mode(gender, "both-no-speech") is None
    assert in_mode(gender, "text").hears == ("transcript",)
    activity = next(test for test in benches if test.name == "speech_activity").task
    assert in_mode(activity, "text") is None


def test_a_generated_label_is_the_one_that_is_written_out_and_nothing_else_is(benches):
    gender = next(test for test in benches if test.name == "gender")
    asked = in_mode(gender.task, "generated")
    assert asked.answer == "text"
    said = {text: answered(gender, "generated", 0, 0, asked, {"text": text}) for text in ("Female.", "a female", "")}
    assert [answer.said for answer in said.values()] == ["female", None, None]
    keywords = next(test for test in benches if test.name == "keyword_search").task
    assert in_mode(keywords, "generated") is None


def test_joint_decoding_asks_with_the_transcript_of_the_llm(benches, tiny_model):
    [test] = [test for test in benches if test.name == "slots"]
    [batch] = heard_batches([test], tiny_model)
    rows = [row for item in test.items for row in batch.rows(test.task, item.recording)]
    heard = [replace(batch.hearings[row], transcript=None) for row in rows]
    with torch.inference_mode():
        told = with_transcripts(heard, read(heard, "audio", tiny_model), tiny_model)
        answers = ask([test.task], told, tiny_model)["slots"]
    plain = [None if isinstance(answer, Unanswered) else answer for answer in answers]
    wanted = [answered(test, "joint", 0, number, test.task, answer) for number, answer in enumerate(plain)]
    assert list(mode_answers(batch, "joint", tiny_model, wordings=False)) == wanted


def test_held_out_wordings_are_asked_beside_the_default_one(benches, tiny_model):
    gender = [test for test in benches if test.name == "gender"]
    [batch] = heard_batches(gender, tiny_model)
    found = list(mode_answers(batch, "both", tiny_model, wordings=True))
    assert {a.wording for a in found} == {0, 1, 2, 3}
    [row] = wording_spread(figures(gender, found, seed=0))
    assert len(row["others"]) == len(gender[0].task.held_out) == 3
    assert row["moved"] == max(abs(value - row["default"]) for value in row["others"])


def test_an_answer_does_not_depend_on_the_tests_beside_it(benches, tiny_model, answers):
    gender = [test for test in benches if test.name == "gender"]
    alone = answer_all(gender, tiny_model, Systems(("both",), False, None, {}))
    assert [a.said for a in of(alone, "gender", "both").values()] == [
        a.said for a in of(answers, "gender", "both").values()
    ]


def item(number: int, truth: str) -> Item:
    return Item(f"r{number}", f"s{number}", "calls", truth, lambda: np.zeros(1, np.float32))


def test_a_system_that_is_right_where_the_cascade_is_wrong_beats_it():
    test = Benchmark("intent", "intent", "real", tuple(item(n, "make_payment") for n in range(40)))
    right = [Answered("intent", "both", 0, n, "make_payment" if n else "other", (0.9,), (n > 0,)) for n in range(40)]
    wrong = [Answered("intent", "cascade", 0, n, "make_payment" if n % 2 else "other") for n in range(40)]
    ours, theirs = figures([test], [*right, *wrong], seed=0)
    assert (ours.value, theirs.value) == (97.5, 50.0)
    assert ours.difference == pytest.approx(47.5)
    assert ours.verdict == "beats"
    assert ours.baseline == "cascade"
    assert ours.calibration_error == pytest.approx(7.5)
    assert theirs.verdict is None
    assert not ours.counted


def test_a_classifier_is_the_baseline_where_there_is_one():
    test = Benchmark("gender", "gender", "real", tuple(item(n, GENDERS[n % 2]) for n in range(40)))
    ours = [Answered("gender", "audio", 0, n, "male") for n in range(40)]
    theirs = [Answered("gender", "classifier", 0, n, GENDERS[n % 2]) for n in range(40)]
    found = {f.system: f for f in figures([test], [*ours, *theirs], seed=0)}
    assert found["audio"].value == 50.0
    assert found["audio"].baseline == "classifier"
    assert found["audio"].verdict == "loses"


def test_a_recording_without_an_answer_counts_as_wrong():
    test = Benchmark("intent", "intent", "real", tuple(item(n, "other") for n in range(4)))
    [found] = figures([test], [Answered("intent", "both", 0, n, "other") for n in range(3)], seed=0)
    assert (found.value, found.items) == (75.0, 4)


def test_a_bundle_with_another_llm_is_no_cascade(tiny_bundle, tiny_model):
    with pytest.raises(BundleError, match="take a bundle with the same LLM"):
        load_cascade(tiny_bundle, "mini", tiny_model, "float32")


def test_an_unknown_test_is_named_with_those_there_are(manifest):
    with pytest.raises(TrainingError, match=r"no test emotions; it allows asr, keyword_search"):
        read_benchmarks(manifest, names=("emotions",), written=False)


def test_a_plot_is_an_image(benches, answers, tmp_path):
    plot(figures(benches, answers, seed=0), tmp_path / "figures.png")
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def svbatch(*arguments: object):
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_answers_figures_a_page_and_a_plot(manifest, tiny_bundle, tmp_path):
    output = tmp_path / "out"
    options = ["--data", manifest, "--output", output, "--cache", tiny_bundle.cache, "--precision", "float32"]
    chosen = ["--test", "gender", "--test", "asr", "--mode", "both", "--classifiers", manifest]
    result = svbatch(tiny_bundle.folder, *options, *chosen, "--cascade", tiny_bundle.folder)
    assert result.exit_code == 0
    page = (output / "report.md").read_text()
    assert result.stdout == page
    assert "| gender (indicative) | UAR |" in page
    assert f"with the adapter of bundle {tiny_bundle.folder}" in page
    rows = pl.read_parquet(output / "figures.parquet").filter(pl.col("source") == "all")
    assert set(rows.select("test", "system").rows()) == {
        *(("asr", s) for s in ("both", "cascade")),
        *(("gender", s) for s in ("both", "classifier")),
    }
    said = pl.read_parquet(output / "answers.parquet")
    assert said.height == 4 * 6
    assert set(map(json.loads, said.filter(pl.col("test") == "gender")["truth"])) == set(GENDERS)
    assert (output / "figures.png").exists()


def test_the_command_knows_every_mode():
    [mode] = [parameter for parameter in evaluate.params if parameter.name == "modes"]
    assert tuple(mode.type.choices) == MODES


def test_the_list_needs_no_model(manifest):
    result = svbatch("nothing", "--data", manifest, "--list")
    assert result.exit_code == 0
    assert "| gender | UAR | 6 | 2 | real | indicative | calls, studio |" in result.stdout


def test_without_an_output_the_command_says_what_to_give(manifest):
    result = svbatch("mini", "--data", manifest)
    assert result.exit_code == 2
    assert "--output DIR" in result.output
