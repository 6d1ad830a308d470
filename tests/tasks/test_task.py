from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.errors import TaskError
from svbatch.tasks.task import LIBRARY_DIR, library_names, load_task, task_version

KEYWORDS = {"keyword_search": {"keywords": ["refund", "New  York"]}}


def write_task(folder, text="", **changes):
    """A small task of type label beside the job; `changes` replace a key's YAML, None removes it."""
    keys = {
        "name": "complaint",
        "version": "1",
        "description": "Whether the caller complains.",
        "answer": "label",
        "instructions": "['What is it?', 'One of {{ labels }}?']",
        "labels": "[{name: yes please, description: agrees}, {name: não, description: refuses}]",
    } | changes
    lines = [f"{key}: {value}" for key, value in keys.items() if value is not None]
    path = folder / "complaint.yaml"
    path.write_text("\n".join([*lines, text]), encoding="utf-8")
    return "./complaint.yaml"


def refusal(entry, base=Path()):
    with pytest.raises(TaskError) as caught:
        load_task(entry, base)
    return str(caught.value)


def load_library_task(name):
    given = {"keyword_search": KEYWORDS, "question": {"question": {"question": "Who calls?"}}}
    return load_task(given.get(name, name), Path())


@pytest.mark.parametrize("name", library_names())
def test_a_library_task_has_fifteen_wordings_and_three_that_are_never_trained_on(name):
    task = load_library_task(name)
    assert task.definition == name == task.name
    assert len(task.instructions) >= 15
    assert len(task.held_out) >= 3
    assert all(task.questions(wording) for wording in (*task.instructions, *task.held_out))


def test_the_library_is_a_folder_of_yaml():
    assert library_names() == sorted(path.stem for path in LIBRARY_DIR.glob("*.yaml"))
    assert {"asr", "keyword_search", "speech_activity"} <= set(library_names())


def test_a_job_asks_of_whole_recordings_what_the_library_asks_of_segments(tmp_path):
    task = load_task({"asr": {"scope": "recording", "name": "transcript"}}, tmp_path)
    assert (task.scope, task.name, task.definition) == ("recording", "transcript", "asr")
    assert task_version(task, "b", {}) != task_version(load_task("asr", tmp_path), "b", {})
    own = write_task(tmp_path, answer="number", labels=None, instructions="[How many]")
    assert "answers of type number are not combined over segments" in refusal({own: {"scope": "recording"}}, tmp_path)


def test_asr_is_the_recognisers_unless_the_job_asks_the_llm():
    assert load_task("asr", Path()).values == {"via": "recogniser"}
    assert load_task({"asr": {"via": "llm"}}, Path()).values == {"via": "llm"}
    assert load_task({"asr": None}, Path()) == load_task("asr", Path())


def test_keyword_search_asks_once_per_keyword():
    task = load_task(KEYWORDS, Path())
    assert task.entries == ("refund", "New York")
    assert task.questions() == (
        'Yes or no, does anyone mention "refund"?',
        'Yes or no, does anyone mention "New York"?',
    )
    assert task.scored == ("yes", "no")


def test_a_name_is_the_jobs_and_the_definition_stays():
    task = load_task({"keyword_search": {"keywords": ["lawyer"], "name": "legal"}}, Path())
    assert (task.name, task.definition, task.is_library) == ("legal", "keyword_search", True)


def test_speech_activity_is_asked_of_windows_of_sound_alone_and_needs_no_speech():
    task = load_task("speech_activity", Path())
    assert (task.scope, task.hears, task.needs_speech) == ("window", ("audio",), False)
    assert task.label_names == ("speech", "no_speech")


def test_a_users_own_task_lies_beside_the_job(tmp_path):
    task = load_task({write_task(tmp_path): {"min_probability": 0.7}}, tmp_path)
    assert (task.name, task.min_probability, task.is_library) == ("complaint", 0.7, False)
    assert task.label_names == ("yes please", "não")
    assert task.questions(task.instructions[1]) == ("One of yes please, não?",)


def test_labels_may_come_from_the_job(tmp_path):
    parameters = "[{name: labels, type: labels, description: what callers want, required: true}]"
    entry = write_task(tmp_path, parameters=parameters, labels=None)
    labels = [{"name": f"intent {i}", "description": "x"} for i in range(300)]
    assert len(load_task({entry: {"labels": labels}}, tmp_path).label_names) == 300
    assert "the key `labels` is missing: what callers want" in refusal(entry, tmp_path)
    assert "stands twice" in refusal({entry: {"labels": [labels[0], labels[0]]}}, tmp_path)
    assert "wrong: description" in refusal({entry: {"labels": [{"name": "x"}, labels[0]]}}, tmp_path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("asrr", "unknown task `asrr`; did you mean `asr`?"),
        ({"asr": {"vja": "llm"}}, "asr: vja: unknown key `vja`; did you mean `via`?"),
        ({"asr": {"via": "lmm"}}, "asr: via: `lmm`; did you mean `llm`?"),
        ({"asr": {"min_probability": 0.5}}, "asr: min_probability: this task's answers have no probability"),
        ({"asr": {"name": "Asr"}}, "asr: name: `Asr` names a table: small letters"),
        ({"asr": {"name": 3}}, "asr: name: `3` names a table"),
        ({"asr": {"name": "speech_activity"}}, "asr: name: `speech_activity` is another task of the library"),
        ({"asr": {"name": "failures"}}, "asr: name: `failures` is a table of every output"),
        ("keyword_search", "keyword_search: the key `keywords` is missing: the words or phrases to look for"),
        ({"keyword_search": {"keywords": []}}, "keywords: `keywords` must be a list of at least one"),
        ({"keyword_search": {"keywords": "refund"}}, "keywords: `keywords` must be a list of at least one"),
        ({"keyword_search": {"keywords": ["a", " "]}}, "keywords: 2: an empty text"),
        ({"keyword_search": {"keywords": ["Straße", "x", "STRASSE"]}}, "keywords: 3: `STRASSE` stands twice"),
        ({"keyword_search": {"keywords": [True]}}, "keywords: 1: `True` is not text; put it in quotes"),
        ({"speech_activity": {"min_probability": 2}}, "min_probability: `2` is no number from 0 to 1"),
        ({"speech_activity": {"min_probability": True}}, "min_probability: `True` is no number from 0 to 1"),
        ({"speech_activity": {"scope": "recording"}}, "scope: a job says `scope: recording` of a task about segments"),
        ({"asr": {"scope": "segment"}}, "asr: scope: a job says `scope: recording` of a task about segments"),
        ({"asr": 3}, "is no task; write `asr`"),
        ({"asr": {}, "legal": {}}, "is no task; write `asr`"),
        (7, "`7` is no task"),
        ("./none.yaml", "none.yaml: no such file"),
        ("./", "not a file"),
        ("a\x00b/c.yaml", "no such file"),
        ("/" + "x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_an_entry_that_is_wrong_is_refused_with_its_key(entry, message):
    assert message in refusal(entry)


def test_every_problem_of_an_entry_is_named():
    lines = refusal({"keyword_search": {"keyword": ["a"], "name": "A", "min_probability": -1}}).splitlines()
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instructions": None}, "complaint.yaml: the key `instructions` is missing"),
        ({"instructions": "[]"}, "line 5: `instructions` is empty; write at least one"),
        ({"instructions": "['Hm?', ' hm? ']"}, "line 5: `hm?` stands twice"),
        ({"held_out": "['what is it?']"}, "line 7: `what is it?` stands twice"),
        ({"instructions": "['{{ labls }}?']"}, "line 5: the placeholder `labls`; did you mean `labels`?"),
        ({"instructions": "['{{ 7 * 7 }}?']"}, "line 5: a template's Mul; a wording holds text"),
        ({"labels": "[{name: A, description: x}, {name: a, description: y}]"}, "line 6: the label `a`"),
        ({"labels": "[{name: A, description: x}]"}, "line 6: 1 labels; an answer of type label needs at least 2"),
        ({"labels": None}, "complaint.yaml: 0 labels"),
        ({"labels": "[{name: A, descripton: x}]"}, "line 6: unknown key `descripton`; did you mean"),
        ({"answer": "text"}, "line 6: an answer of type text has no labels"),
        ({"answer": "lable"}, "line 4: `answer` is `lable`; choose text, label, "),
        ({"name": "runs"}, "line 1: `runs` is a table of every output"),
        ({"name": "asr"}, "`asr` is a task of the library"),
        ({"name": "Complaint"}, "line 1: `name` is `Complaint`; it must match ^[a-z]"),
        ({"version": "one"}, "line 2: `version` is `one`: input should be a valid integer"),
        ({"description": "no"}, "line 3: `description` is read as false; for text, put it in quotes"),
        ({"max_tokens": "9"}, "line 7: an answer of type label is scored, not generated"),
        ({"min_probability": "1.5"}, "line 7: `min_probability` is 1.5: input should be less"),
        ({"hears": "[audio, audio]"}, "line 7: `audio` stands twice"),
        ({"hears": "audio"}, "line 7: `hears` must be a list, not `audio`"),
        ({"each": "words"}, "line 7: `words` is no parameter"),
        ({"scop": "segment"}, "line 7: unknown key `scop`; did you mean `scope`?"),
        ({"parameters": "[{name: a, type: text, description: x}]"}, "line 7: `a` has no default"),
        ({"parameters": "[{name: a, type: choice, description: x, required: true}]"}, "line 7: choices go"),
        (
            {"parameters": "[{name: a, type: choice, description: x, choices: [b], default: c}]"},
            "line 7: `c` is none of b",
        ),
        ({"parameters": "[{name: name, type: text, description: x, required: true}]"}, "task has `name`"),
        ({"parameters": "[{name: a, type: texts, description: x}]"}, "line 7: `a` is of type texts; say"),
        (
            {"parameters": "[{name: a, type: texts, description: x, required: true, entry: b}]"},
            "line 7: `entry` goes with",
        ),
        (
            {"parameters": "[{name: a, type: texts, description: x, required: true, entry: b}]", "each": "a"},
            "line 5: {{ b }} is missing: the question is asked once per b",
        ),
        ({"labels": "&x [*x]"}, "line 6: an alias"),
        ({"labels": "!!python/object/apply:os.system [x]"}, "line 6: the tag"),
    ],
)
def test_a_task_file_that_is_wrong_is_refused_with_its_line(tmp_path, changes, message):
    assert message in refusal(write_task(tmp_path, **changes), tmp_path)


def test_labels_may_be_prefixes_of_another_and_not_ascii(tmp_path):
    labels = "[{name: no, description: x}, {name: no way, description: y}, {name: 嫌だ, description: z}]"
    labels = labels.replace("name: no,", "name: 'no',")
    task = load_task(write_task(tmp_path, labels=labels), tmp_path)
    assert task.label_names == ("no", "no way", "嫌だ")


def test_a_version_is_sixteen_hex_digits_and_does_not_change():
    version = task_version(load_task(KEYWORDS, Path()), "mini-1", {"max_segment_s": 30})
    assert version == task_version(load_task(KEYWORDS, Path()), "mini-1", {"max_segment_s": 30})
    assert len(version) == 16
    assert set(version) <= set("0123456789abcdef")


def test_a_version_changes_with_all_that_can_change_an_answer(tmp_path):
    settings = {"max_segment_s": 30}
    tasks = [
        load_task(write_task(tmp_path, **changes), tmp_path)
        for changes in [
            {},
            {"version": "2"},
            {"instructions": "['What is it then?']"},
            {"labels": "[{name: yes please, description: agrees}, {name: never, description: refuses}]"},
            {"labels": "[{name: yes please, description: agrees}, {name: não, description: denies}]"},
            {"labels": "[{name: não, description: refuses}, {name: yes please, description: agrees}]"},
            {"hears": "[audio]"},
            {"scope": "recording"},
            {"needs_speech": "false"},
            {"min_probability": "0.5"},
            {"answer": "labels", "instructions": "['Is it {{ label }}?']"},
            {"answer": "items", "labels": None, "instructions": "['What?']"},
            {"answer": "items", "labels": None, "instructions": "['What?']", "limits": "{max_items: 3}"},
        ]
    ]
    versions = [task_version(task, "mini-1", settings) for task in tasks]
    versions += [task_version(tasks[0], "mini-2", settings), task_version(tasks[0], "mini-1", {})]
    for entry in ("asr", {"asr": {"via": "llm"}}):
        versions.append(task_version(load_task(entry, Path()), "mini-1", settings))
    assert len(set(versions)) == len(versions)


def test_a_version_does_not_change_with_names_and_wordings_that_are_not_asked(tmp_path):
    tasks = [
        load_task(write_task(tmp_path, **changes), tmp_path)
        for changes in [
            {},
            {"name": "grumble"},
            {"description": "Else."},
            {"instructions": "['What is it?']"},
            {"held_out": "['Hm?']"},
            {"metric": "accuracy"},
            {"hears": "[transcript, audio]"},
        ]
    ]
    assert len({task_version(task, "mini-1", {}) for task in tasks}) == 1


def test_the_order_of_settings_does_not_change_a_version():
    task = load_task("asr", Path())
    assert task_version(task, "m", {"a": 1, "b": 2}) == task_version(task, "m", {"b": 2, "a": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)


ENTRIES = JSON | JSON.map(lambda v: {"keyword_search": {"keywords": v}}) | JSON.map(lambda v: {"asr": v})


@settings(deadline=None)
@given(ENTRIES)
def test_any_entry_is_a_task_or_a_refusal(entry):
    with suppress(TaskError):
        load_task(entry, Path("/nowhere"))
