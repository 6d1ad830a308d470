import numpy as np
import pytest
import torch

from svbatch.training.benchmark import Benchmark, Item
from svbatch.training.frame_classifier import FrameClassifier, classifiable, load_classifiers, trained


def frames_of(label: int, random: np.random.Generator, width: int = 8) -> np.ndarray:
    """Noise of any length whose mean along one direction tells the label."""
    frames = random.normal(size=(int(random.integers(20, 60)), width))
    frames[:, label] += 1.5
    return frames.astype(np.float16)


def test_it_learns_to_tell_frames_apart():
    random = np.random.default_rng(0)
    labels = [n % 3 for n in range(90)]
    classifier = trained(
        [frames_of(label, random) for label in labels], labels, [n % 6 == 5 for n in range(90)], seed=0
    )
    right = 0
    for label in range(3):
        for _ in range(10):
            one = torch.from_numpy(frames_of(label, random).astype(np.float32))
            right += int(classifier(one[None], torch.tensor([len(one)])).argmax()) == label
    assert right >= 27


def test_training_follows_from_its_seed():
    random = np.random.default_rng(1)
    labels = [n % 2 for n in range(12)]
    frames = [frames_of(label, random) for label in labels]
    one, other = (trained(frames, labels, [False] * 12, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_padding_changes_no_answer():
    torch.manual_seed(0)
    classifier = FrameClassifier(8, 3).eval()
    short = torch.randn(1, 10, 8)
    padded = torch.cat([short, torch.randn(1, 15, 8)], dim=1)
    with torch.inference_mode():
        alone, beside = classifier(short, torch.tensor([10])), classifier(padded, torch.tensor([10]))
    torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize(
    ("name", "expected"), [("emotion", True), ("sentiment", True), ("speech_activity", True), ("intent", False)]
)
def test_it_stands_beside_what_is_told_by_the_sound(name, expected):
    item = Item("a", None, "", "x", lambda: np.zeros(16_000, np.float32))
    assert classifiable(Benchmark(name, name, "real", (item,))) is expected


def test_a_trained_classifier_is_read_again(tiny_model, bursts, tmp_path, caplog):
    items = tuple(
        Item(f"{n}", f"s{n}", "", ["female", "male"][n % 2], lambda n=n: bursts(0.5 + n / 10, seed=n)) for n in range(6)
    )
    test = Benchmark("gender", "gender", "real", items)
    first = load_classifiers([test], [test], tiny_model, "e", tmp_path)["gender"].state_dict()
    [path] = (tmp_path / "classifiers").iterdir()
    written = path.stat().st_mtime_ns
    again = load_classifiers([test], [test], tiny_model, "e", tmp_path)["gender"].state_dict()
    assert path.stat().st_mtime_ns == written
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_test_without_training_recordings_has_no_classifier_and_says_so(tiny_model, tmp_path, caplog):
    item = Item("a", None, "", "happy", lambda: np.zeros(16_000, np.float32))
    test = Benchmark("emotion", "emotion", "real", (item,))
    assert load_classifiers([test], [], tiny_model, "e", tmp_path) == {}
    assert "emotion" in caplog.text
