import numpy as np
import pytest

from svbatch.errors import TrainingError
from svbatch.training.voices import VOICES, choose_voices, missing_packages, speak, speak_with_word_times

ESPEAK = choose_voices(["espeak-ng"])


def needs(voices):
    missing = missing_packages(voices)
    return pytest.mark.skipif(bool(missing), reason=f"needs Debian's {', '.join(missing)}")


def loudness(waveform, rate_hz):
    """Root mean square over 5 ms around each sample, of 1 at its peak."""
    width = rate_hz // 200
    power = np.convolve(waveform.astype(np.float64) ** 2, np.ones(width) / width, "same")
    return np.sqrt(power / power.max())


@pytest.mark.parametrize(
    "speaker",
    [
        pytest.param(voice.speaker, marks=needs([voice]))
        for voice in VOICES
        if voice.synthesiser != "espeak-ng" or voice.name in {"en-us+f3", "en+m1"}
    ],
)
def test_every_synthesiser_gives_speech_at_16_khz_and_a_slower_rate_takes_longer(speaker):
    (voice,) = choose_voices([speaker])
    fast, _ = speak("Seven brown hens crossed the road.", voice, rate=1.2)
    slow, _ = speak("Seven brown hens crossed the road.", voice, rate=0.8)
    assert fast.dtype == np.float32
    assert fast.ndim == 1
    assert 1.0 < len(fast) / 16_000 < 4.0
    assert 0.1 < np.abs(fast).max() <= 1.0
    assert 1.3 < len(slow) / len(fast) < 1.7


@needs(ESPEAK)
def test_all_espeak_voices_exist_and_differ():
    spoken = {speak_with_word_times("Good morning.", voice.name)[0].tobytes() for voice in ESPEAK}
    assert len(spoken) == len(ESPEAK) == 96


@needs(ESPEAK)
def test_word_times_have_one_entry_for_each_word_and_rise():
    text = "A refund of the $45.20, please: I don't know, was it twenty-five or 1984?"
    waveform, rate_hz, words = speak_with_word_times(text, "en-us+f3")
    starts = [start for _, start in words if start is not None]
    assert [word for word, _ in words] == text.split()
    assert [word for word, start in words if start is None] == ["the"]
    assert starts == sorted(set(starts))
    assert starts[0] == 0.0
    assert starts[-1] < len(waveform) / rate_hz


@needs(ESPEAK)
@pytest.mark.parametrize("voice", ["en-us+f3", "en+m5", "en-gb-scotland+f1"])
@pytest.mark.parametrize("rate", [0.85, 1.2])
def test_a_word_after_a_pause_starts_where_the_sound_starts(voice, rate):
    waveform, rate_hz, words = speak_with_word_times("Apples, bananas, oranges, lemons, melons.", voice, rate=rate)
    loud = loudness(waveform, rate_hz) > 0.02
    for _, start in words[1:]:
        begin = round((start - 0.08) * rate_hz)
        assert not loud[begin], "the pause before the word is silent"
        heard = (begin + int(np.argmax(loud[begin:]))) / rate_hz
        assert heard == pytest.approx(start, abs=0.06)


@needs(ESPEAK)
def test_an_unknown_espeak_voice_is_refused_by_name():
    with pytest.raises(TrainingError, match="no voice 'xx-nowhere'"):
        speak_with_word_times("Hello.", "xx-nowhere")


@needs(ESPEAK)
def test_text_without_a_word_is_refused():
    with pytest.raises(TrainingError, match="could not speak '…'"):
        speak_with_word_times("…", "en-us+f3")


def test_voices_are_chosen_by_synthesiser_or_by_name():
    assert [voice.speaker for voice in choose_voices(["festival-kal_diphone", "flite"])] == [
        "flite-awb",
        "flite-kal16",
        "flite-rms",
        "flite-slt",
        "festival-kal_diphone",
    ]
    with pytest.raises(TrainingError, match="unknown voice flight, kal; name a synthesiser"):
        choose_voices(["flight", "flite", "kal"])
