from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from svbatch.model import load_encoder
from svbatch.onnx import OnnxSession
from svbatch.speech.encoder import encode, num_frames
from svbatch.training.data import Example
from svbatch.training.frames import Clip, LiveClip, cached_frames, composed


@pytest.fixture(scope="module")
def examples(bursts, tmp_path_factory) -> list[Example]:
    folder = tmp_path_factory.mktemp("train")
    for number, seconds in enumerate((1.0, 0.33, 2.5)):
        soundfile.write(folder / f"{number}.wav", bursts(seconds, seed=number), 16_000)
    return [Example(path, text="a") for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def session(tiny_base) -> OnnxSession:
    return load_encoder(tiny_base, "cpu")


def cached(examples: list[Example], session: OnnxSession, cache: Path) -> list[Clip]:
    return cached_frames(examples, session, "encoder", cache, num_passes=2, seed=0)[0]


def test_each_pass_has_a_clip_of_every_example_as_long_as_its_sound(examples, session, tmp_path):
    clips = cached(examples, session, tmp_path)
    recorded, changed = ([c for c in clips if c.shard.name.startswith(f"pass{n}-")] for n in (0, 1))
    assert sorted(clip.example for clip in recorded) == sorted(clip.example for clip in changed) == [0, 1, 2]
    for clip in recorded:
        samples, _ = soundfile.read(examples[clip.example].path)
        assert clip.length == num_frames(len(samples))
        assert clip.read().shape == (clip.length, 64)
        assert clip.read().dtype == np.float16


def test_the_first_example_of_a_window_has_the_frames_of_its_sound(examples, session, tmp_path):
    """The others of a window hear it too, so only the loudness of the start is compared: shape and no zeros."""
    clips = cached([examples[0]], session, tmp_path)
    samples, _ = soundfile.read(examples[0].path, dtype="float32")
    expected = encode(session, [samples])[0][: clips[0].length]
    np.testing.assert_allclose(clips[0].read(), expected, atol=1e-2)


def test_an_interrupted_pass_goes_on_where_it_stopped(examples, session, tmp_path):
    clips = cached(examples, session, tmp_path)
    frames = [clip.read() for clip in clips]
    folder = clips[0].shard.parent
    [plan] = folder.glob("passes-*.json")
    whole, lost = folder / "pass0-000000.npy", folder / "pass1-000000.npy"
    made_at = whole.stat().st_mtime_ns
    plan.unlink()
    lost.with_suffix(".json").unlink()  # killed after the frames were written and before their index
    lost.write_bytes(b"")
    again = cached(examples, session, tmp_path)
    assert again == clips
    assert whole.stat().st_mtime_ns == made_at
    for clip, expected in zip(again, frames, strict=True):
        np.testing.assert_array_equal(clip.read(), expected)


def test_a_whole_cache_needs_neither_sound_nor_encoder(examples, session, tmp_path):
    clips = cached(examples, session, tmp_path)
    made_at = {path: path.stat().st_mtime_ns for path in clips[0].shard.parent.iterdir()}
    assert cached(examples, session, tmp_path) == clips
    assert {path: path.stat().st_mtime_ns for path in made_at} == made_at
    assert [path for path in made_at if path.suffix == ".part"] == []


def test_beyond_its_limit_a_cache_holds_no_more_and_the_rest_is_heard_anew_and_varied(examples, session, tmp_path):
    clips, _ = cached_frames(examples, session, "encoder", tmp_path, num_passes=1, seed=0, max_bytes=1_000)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.npy")) <= 1_000
    assert sorted(clip.example for clip in clips if isinstance(clip, LiveClip)) == [0, 1, 2]
    torch.manual_seed(0)
    first, second = clips[0].read(), clips[0].read()
    torch.manual_seed(0)
    np.testing.assert_array_equal(clips[0].read(), first)
    assert first.shape != second.shape or not np.array_equal(first, second)
    assert first.dtype == np.float16
    assert abs(len(first) - clips[0].length) <= 0.15 * clips[0].length + 1


def test_what_fits_into_the_limit_is_cached(examples, session, tmp_path):
    clips, _ = cached_frames(examples, session, "encoder", tmp_path, num_passes=1, seed=0, max_bytes=10**9)
    assert {type(clip) for clip in clips} == {Clip}


@pytest.mark.parametrize("layout", ["joined", "mixed"])
def test_two_voices_are_both_heard(layout):
    random = np.random.default_rng(0)
    first, second = np.full(8_000, 0.5, np.float32), np.full(6_000, -0.1, np.float32)
    sound = composed(first, second, layout, random)
    if layout == "joined":
        np.testing.assert_array_equal(sound[:8_000], first)
        assert (sound[-6_000:] < 0).all()
        assert len(sound) > 14_000
    else:
        changed = sound[:8_000] != first
        assert 0 < changed.sum() <= 6_000
