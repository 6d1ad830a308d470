from pathlib import Path

from svbatch.bundle import find_bundle
from svbatch.training.card import card, sources
from svbatch.training.data import Example


def test_the_card_of_mini_is_that_of_its_bundle_json():
    mini = find_bundle("mini")
    assert (mini.folder / "README.md").read_text(encoding="utf-8") == card(mini.manifest)


def test_a_card_says_licences_hours_steps_figures_and_what_it_is_not_for(tiny_bundle):
    interval = {"value": 91.0, "low": 86.3, "high": 94.8}
    figures = {
        "keyword_search": {"metric": "accuracy", "recordings": 100, "indicative": False,
                           "both": {**interval, "calibration_error": 4.1, "verdict": "beats"}, "cascade": interval},
        "set": "made for a test",
    }  # fmt: skip
    trained_on = [{"source": "calls", "licence": "CC0-1.0", "examples": 7, "hours": 0.25}]
    page = card(tiny_bundle.manifest.model_copy(update={"figures": figures, "data": trained_on}))
    assert "Not for: anything but tests" in page
    assert "| adapter.safetensors | 0.0 | Apache-2.0 | this folder |" in page
    assert "| calls | CC0-1.0 | 7 | 0.25 |" in page
    assert "| align_again | 400 | projector |" in page
    assert "Probabilities are calibrated of: speech_activity." in page
    assert "- set: made for a test" in page
    assert "| test | metric | recordings | both | cascade |" in page
    assert "| keyword_search | accuracy | 100 | 91.0 (86.3 to 94.8), ECE 4.1, beats | 91.0 (86.3 to 94.8) |" in page


def test_a_bundle_is_published_with_its_card(tiny_bundle):
    page = (tiny_bundle.folder / "README.md").read_text(encoding="utf-8")
    assert page == card(tiny_bundle.manifest)
    assert "None were measured." in page


def test_hours_are_those_that_the_manifest_says():
    odd = Example(Path("o.wav"), source="odd", labels={"duration": "00:12"})
    calls = [Example(Path(f"{n}.wav"), source="calls", licence="ours", labels={"duration": 90.0}) for n in range(20)]
    noise = [Example(Path("n.wav"), source="noise", labels={"duration": 9.0}), Example(Path("m.wav"), source="noise")]
    assert sources([*calls, *noise, odd]) == [
        {"source": "calls", "licence": "ours", "examples": 20, "hours": 0.5},
        {"source": "noise", "licence": "", "examples": 2},
        {"source": "odd", "licence": "", "examples": 1},
    ]
