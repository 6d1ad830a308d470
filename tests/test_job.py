import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from svbatch.errors import JobError
from svbatch.job import Job, load_job

WHOLE = """\
corpus: recordings/
tasks:
  - asr
  - keyword_search: {keywords: [refund, invoice]}
  - keyword_search: {keywords: [lawyer], name: legal}
  - ./complaint.yaml
output: out/
"""
COMPLAINT = """\
name: complaint
version: 1
description: Whether the caller complains.
answer: yes_no
instructions:
  - Does the caller complain? Answer yes or no.
"""


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    """A function that writes job.yaml into the current folder, beside complaint.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "complaint.yaml").write_text(COMPLAINT)

    def write(text):
        path = Path("job.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def problems(path, **overrides):
    with pytest.raises(JobError) as caught:
        load_job(path, **overrides)
    return str(caught.value).splitlines()


def test_a_job_has_its_keys_and_good_defaults(job_file, tmp_path):
    job = load_job(job_file(WHOLE))
    assert [task.name for task in job.tasks] == ["asr", "keyword_search", "legal", "complaint"]
    assert (job.corpus, job.corpus_base, job.output) == (("recordings/",), tmp_path, tmp_path / "out")
    assert (job.bundle, job.precision, job.device) == ("mini", "auto", "auto")
    assert job.max_memory_bytes == 2 * 2**30


def test_every_key_can_be_given(job_file, tmp_path):
    text = "corpus: [a, b/*.wav]\ntasks: [asr]\noutput: /tmp/x\nbundle: ./mine\nprecision: float32\n"
    job = load_job(job_file(text + "device: cpu\n"))
    assert (job.corpus, job.output) == (("a", "b/*.wav"), Path("/tmp/x"))
    assert (job.bundle, job.precision, job.device) == (str(tmp_path / "mine"), "float32", "cpu")


def test_paths_start_from_the_job_file_and_overrides_from_here(job_file, tmp_path, monkeypatch):
    path = job_file(WHOLE).absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_job(path).corpus_base == tmp_path
    assert load_job(path).output == tmp_path / "out"
    job = load_job(path, corpus=["x.wav"], output=Path("../o"))
    assert (job.corpus, job.corpus_base) == (("x.wav",), tmp_path / "elsewhere")
    assert job.output == tmp_path / "o"


def test_overrides_stand_in_for_keys_that_the_file_does_not_have(job_file):
    assert load_job(job_file("tasks: [asr]"), corpus=["a"], output=Path("b")).corpus == ("a",)


def test_an_output_may_be_an_address(job_file):
    path = job_file("corpus: a\ntasks: [asr]\noutput: s3://bucket/out\n")
    assert load_job(path).output == "s3://bucket/out"
    assert load_job(path, output="s3://bucket/other").output == "s3://bucket/other"
    assert load_job(path, output="other").output == Path.cwd() / "other"


def test_an_override_that_is_wrong_has_no_line(job_file):
    assert problems(job_file(WHOLE), corpus=[""]) == ["job.yaml: `corpus.1` is empty; write at least one"]


def test_a_misspelt_key_is_refused_with_its_line_and_the_nearest_one(job_file):
    found = problems(job_file(WHOLE.replace("\ntasks:", "\ntaks:")))
    assert found == [
        "job.yaml: the key `tasks` is missing",
        "job.yaml, line 2: unknown key `taks`; did you mean `tasks`?",
    ]


def test_all_errors_are_named_at_once_in_the_order_of_lines(job_file):
    text = """\
corpus: 7
tasks:
  - asr: {via: lmm}
  - keyword_search:
      keywords: []
      nam: x
  - emotions
precision: fp16
output: no
devise: cpu
"""
    assert problems(job_file(text)) == [
        "job.yaml, line 1: `corpus.1` is read as 7; for text, put it in quotes",
        "job.yaml, line 3: `lmm`; did you mean `llm`?",
        "job.yaml, line 5: `keywords` must be a list of at least one",
        "job.yaml, line 6: unknown key `nam`; did you mean `name`?",
        "job.yaml, line 7: unknown task `emotions`; did you mean `emotion`?; your own starts with ./ or ends in .yaml",
        "job.yaml, line 8: `precision` is `fp16`; choose auto, float32 or bfloat16",
        "job.yaml, line 9: `output` is read as false; for text, put it in quotes",
        "job.yaml, line 10: unknown key `devise`; did you mean `device`?",
    ]


def test_two_tasks_of_one_name_are_refused_with_the_line_that_fixes_it(job_file):
    text = WHOLE.replace(", name: legal", "").replace("  - ./complaint.yaml", "  - asr")
    found = problems(job_file(text))
    assert found == [
        "job.yaml, line 5: a task before this is named `keyword_search` too; "
        "write `- keyword_search: {keywords: [lawyer], name: keyword_search_2}`",
        "job.yaml, line 6: a task before this is named `asr` too; write `- asr: {name: asr_2}`",
    ]
    for problem in found:
        line, fix = int(problem.split("line ")[1].split(":")[0]), problem.split("`")[3]
        lines = text.splitlines()
        text = "\n".join([*lines[: line - 1], "  " + fix, *lines[line:]])
    names = [task.name for task in load_job(job_file(text)).tasks]
    assert names == ["asr", "keyword_search", "keyword_search_2", "asr_2"]


def test_a_name_that_fixes_it_is_not_taken_itself(job_file):
    found = problems(job_file("corpus: a\noutput: b\ntasks: [asr, asr, {asr: {name: asr_2}}, asr]"))
    assert [problem.split("write ")[1] for problem in found] == [
        "`- asr: {name: asr_3}`",
        "`- asr: {name: asr_4}`",
    ]


def test_a_problem_in_a_task_file_names_both_files_and_lines(job_file, tmp_path):
    (tmp_path / "complaint.yaml").write_text(COMPLAINT.replace("answer:", "anser:"))
    assert problems(job_file(WHOLE)) == [
        f"job.yaml, line 6: {tmp_path}/complaint.yaml: the key `answer` is missing",
        f"job.yaml, line 6: {tmp_path}/complaint.yaml, line 4: unknown key `anser`; did you mean `answer`?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "job.yaml: the file is empty; write lines of the form `key: value`"),
        ("# nothing\n", "job.yaml: the file is empty; write lines of the form `key: value`"),
        ("- asr\n", "job.yaml: the file is a list; write lines of the form `key: value`"),
        ("asr\n", "job.yaml: the file is a single value; write lines of the form `key: value`"),
        ("corpus: a\ntasks:\n\t- asr\n", "job.yaml, line 3: a tab; indent with spaces"),
        ("corpus: a\n\ttasks: b\n", "job.yaml, line 2: a tab; indent with spaces"),
        ("corpus: a\ncorpus: b\n", "job.yaml, line 2: the key `corpus` stands on line 1 already; keep one"),
        ("corpus: a\n---\ncorpus: b\n", "job.yaml, line 2: a second document (---); keep one per file"),
        ("corpus: &a [*a]\n", "job.yaml, line 1: an alias (*); write the value out"),
        ("corpus: !!python/name:os.system x\n", "job.yaml, line 1: the tag `tag:yaml.org,2002:python"),
        ("corpus: a\nyes: b\n", "job.yaml, line 2: the key `yes` is not a word"),
        ("? [a]\n: b\n", "job.yaml, line 1: the key"),
        ("corpus: [a\n", "job.yaml, line 2: expected ',' or ']', but got '<stream end>'"),
        ("corpus: a\0\n", "job.yaml, line 1: a control character; remove it"),
        ('corpus: "\\0"\n', "job.yaml, line 1: `corpus.1`"),
        ('corpus: "\\ud800"\n', "job.yaml, line 1: `\\ud800` holds half a surrogate pair"),
        (b"corpus: a\n# \xff\n", "job.yaml, line 2: not UTF-8; save the file as UTF-8 text"),
        ("corpus: " + "[" * 600, "job.yaml: not YAML, or nested too deeply"),
        ("corpus: " + "1" * 5000, "is not a number; put text in quotes"),
        ("corpus: a\noutput: b\ntasks: []\n", "job.yaml, line 3: `tasks` must be a list"),
        ("corpus: a\noutput: b\ntasks: asr\n", "job.yaml, line 3: `tasks` must be a list"),
        ("corpus: []\noutput: b\ntasks: [asr]\n", "job.yaml, line 1: `corpus` is empty; write at least one"),
        ("corpus: a\noutput:\ntasks: [asr]\n", "job.yaml, line 2: `output` is read as nothing (null)"),
    ],
)
def test_a_text_that_is_no_job_is_refused_with_its_line(job_file, text, message):
    assert message in "\n".join(problems(job_file(text)))


def test_a_job_that_is_not_there_is_refused(tmp_path):
    assert problems(tmp_path / "job.yaml") == [f"{tmp_path}/job.yaml: no such file"]
    assert problems(tmp_path) == [f"{tmp_path}: not a file"]


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "job.yaml")
    assert problems(tmp_path / "job.yaml") == [f"{tmp_path}/job.yaml: not a file"]


def test_a_byte_order_mark_and_windows_line_ends_are_taken(job_file):
    assert len(load_job(job_file(b"\xef\xbb\xbf" + WHOLE.replace("\n", "\r\n").encode())).tasks) == 4


def outcome(path, content):
    """The job of a file with this content, or the lines of its refusal."""
    path.write_bytes(content)
    try:
        return load_job(path)
    except JobError as error:
        return str(error).splitlines()


SYNTAX = ["\n", "\n  ", "\n  - ", ": ", "{", "}", "[", "]", "&a", "*a", "!!int", "|", "'", "#", "\t"]
VALUES = ["1e9", "no", "~", "2024-13-45", "0b_", "é", "via", "name", "1:99", "=", "._", ".inf", "<<", "---"]
PIECES = [*WHOLE.split(), *SYNTAX, *VALUES]


@settings(deadline=None)
@given(st.binary() | st.text().map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_job_or_a_refusal(tmp_path_factory, content):
    assert outcome(tmp_path_factory.getbasetemp() / "any.yaml", content)


@example(["corpus", ": ", "!!int", " ", "x"])
@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30))
def test_any_yaml_is_a_job_or_a_refusal_of_lines_that_name_the_file(tmp_path_factory, pieces):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    found = outcome(path, "".join(pieces).encode("utf-8", "surrogatepass"))
    assert isinstance(found, Job) or all(line.startswith(str(path)) for line in found)


@settings(deadline=None)
@given(st.integers(0, len(WHOLE)), st.integers(0, 9), st.sampled_from([*PIECES, ""]))
def test_a_job_with_a_piece_changed_is_a_job_or_a_refusal(tmp_path_factory, start, length, piece):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    found = outcome(path, (WHOLE[:start] + piece + WHOLE[start + length :]).encode())
    assert isinstance(found, Job) or all(line.startswith(str(path)) for line in found)


def test_memory_is_given_with_its_unit(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("corpus: a\ntasks: [asr]\noutput: out\nmax_memory: 512 MiB\n")
    assert load_job(path).max_memory_bytes == 512 * 2**20
    path.write_text("corpus: a\ntasks: [asr]\noutput: out\nmax_memory: 512\n")
    with pytest.raises(JobError, match="line 4: `max_memory`"):
        load_job(path)
    path.write_text("corpus: a\ntasks: [asr]\noutput: out\nmax_memory: 2GB\n")
    with pytest.raises(JobError, match=r"line 4: `max_memory` is `2GB`; .*MiB"):
        load_job(path)


def test_links_and_manifests_lead_out_only_if_the_job_says_so(job_file):
    assert load_job(job_file(WHOLE)).follow_outside is False
    assert load_job(job_file(WHOLE + "follow_outside: true\n")).follow_outside is True
    assert problems(job_file(WHOLE + "follow_outside: 1\n")) == [
        "job.yaml, line 8: `follow_outside` is 1: input should be a valid boolean"
    ]
