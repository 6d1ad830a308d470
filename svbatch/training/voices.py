"""The voices that speech is synthesised with: espeak-ng (96 voices, formants), flite (4) and festival (3).

All come from Debian packages. espeak-ng is called as a library, because only so does it tell when each word
begins; the others are run as programs.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from svbatch.errors import TrainingError

SAMPLE_RATE_HZ = 16_000
WORDS_PER_MINUTE = 170  # espeak-ng at rate 1
TIMEOUT_S = 120  # one sentence takes under a second


@dataclass(frozen=True)
class Voice:
    """`name` as the synthesiser knows it; `package` of Debian that brings it; `licence` of its sound."""

    synthesiser: Literal["espeak-ng", "flite", "festival"]
    name: str
    gender: Literal["female", "male"]
    package: str
    licence: str

    @property
    def speaker(self) -> str:
        return f"{self.synthesiser}-{self.name}"

    @property
    def accent(self) -> Literal["american", "british"] | None:
        """None for espeak-ng's Caribbean English, which is neither."""
        if self.synthesiser != "espeak-ng":
            return "british" if self.name == "awb" else "american"
        accent, _, _ = self.name.partition("+")
        return "american" if accent.startswith("en-us") else None if accent == "en-029" else "british"


# espeak-ng is GPL-3.0-or-later; that covers the program, not the sound that it makes.
ESPEAK_LICENCE = "unrestricted (output of espeak-ng)"
ESPEAK_ACCENTS = (
    *("en-us", "en-us-nyc", "en-029"),
    *("en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd"),  # en is en-gb
)
ESPEAK_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5")


def _espeak_voice(accent: str, variant: str) -> Voice:
    gender: Literal["female", "male"] = "female" if variant.startswith("f") else "male"
    return Voice("espeak-ng", f"{accent}+{variant}", gender, "espeak-ng", ESPEAK_LICENCE)


VOICES = (
    *(_espeak_voice(accent, variant) for accent in ESPEAK_ACCENTS for variant in ESPEAK_VARIANTS),
    Voice("flite", "awb", "male", "flite", "MIT-Festival"),
    Voice("flite", "kal16", "male", "flite", "MIT-Festival"),
    Voice("flite", "rms", "male", "flite", "MIT-Festival"),
    Voice("flite", "slt", "female", "flite", "MIT-Festival"),
    Voice("festival", "kal_diphone", "male", "festvox-kallpc16k", "MIT-Festival"),
    Voice("festival", "ked_diphone", "male", "festvox-kdlpc16k", "MIT-Festival"),
    Voice("festival", "cmu_us_slt_arctic_hts", "female", "festvox-us-slt-hts", "MIT-Festival"),
)


def choose_voices(names: Sequence[str]) -> list[Voice]:
    """The voices of the synthesisers ("flite") or speakers ("flite-slt") named, in the order of VOICES.

    Raises TrainingError naming all unknown ones.
    """
    known = {voice.synthesiser for voice in VOICES} | {voice.speaker for voice in VOICES}
    if unknown := [name for name in names if name not in known]:
        raise TrainingError(
            f"unknown voice {', '.join(unknown)}; name a synthesiser (espeak-ng, flite, festival) "
            "or one voice, such as espeak-ng-en-us+f3, flite-slt, festival-kal_diphone"
        )
    return [voice for voice in VOICES if voice.synthesiser in names or voice.speaker in names]


def missing_packages(voices: Iterable[Voice]) -> list[str]:
    """Debian packages to install before all of `voices` can speak, sorted."""
    return sorted({voice.package for voice in voices if not _is_installed(voice)})


def _is_installed(voice: Voice) -> bool:
    if voice.synthesiser == "espeak-ng":
        return _espeak() is not None
    if voice.synthesiser == "flite":
        return shutil.which("flite") is not None
    return voice.name in _festival_voices()


@cache
def _festival_voices() -> frozenset[str]:
    """Names of the voices that festival finds; each voice's package brings festival itself."""
    if shutil.which("text2wave") is None:
        return frozenset()
    command = ["festival", "--batch", "(print (voice.list))"]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    return frozenset(listing.stdout.strip().strip("()").split())


def speak(
    text: str, voice: Voice, *, rate: float = 1.0, pitch: int = 50
) -> tuple[NDArray[np.float32], list[tuple[str, float | None]]]:
    """Waveform (S,) float32 at 16 kHz in [-1, 1], and the words with their starts in seconds.

    `text` is ASCII; `rate` is relative to the voice's own, `pitch` from 0 to 100. Only espeak-ng varies its
    pitch and tells word starts (see `speak_with_word_times`); for the others the list is empty.
    Raises TrainingError where the synthesiser fails.
    """
    words: list[tuple[str, float | None]] = []
    if voice.synthesiser == "espeak-ng":
        waveform, rate_hz, words = speak_with_word_times(text, voice.name, rate=rate, pitch=pitch)
    elif voice.synthesiser == "flite":
        options = ["-voice", voice.name, "--setf", f"duration_stretch={1 / rate:.3f}"]
        waveform, rate_hz = _run(["flite", *options, "-f", "TEXT", "-o", "WAVE"], text)
    else:
        pace = f"(Parameter.set 'Duration_Stretch {1 / rate:.3f})"
        if voice.name.endswith("_hts"):  # it leaves durations to hts_engine, which has its own option
            pace = f'(set! hts_engine_params (append hts_engine_params \'(("-r" {rate}))))'
        choice = f"(begin (voice_{voice.name}) {pace})"
        waveform, rate_hz = _run(["text2wave", "-eval", choice, "-o", "WAVE", "TEXT"], text)
    resampled = soxr.resample(waveform, rate_hz, SAMPLE_RATE_HZ)
    return np.clip(resampled, -1, 1), words


def _run(command: Sequence[str], text: str) -> tuple[NDArray[np.float32], int]:
    """Waveform (S,) and sample rate in Hz of a program that reads the file TEXT and writes the file WAVE."""
    with tempfile.TemporaryDirectory() as folder:
        files = {"TEXT": Path(folder, "sentence.txt"), "WAVE": Path(folder, "speech.wav")}
        files["TEXT"].write_text(text + "\n", encoding="ascii")
        words = [str(files.get(word, word)) for word in command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode or not files["WAVE"].exists():
            reason = done.stderr.strip() or "it wrote no sound"
            raise TrainingError(f"{command[0]} could not speak {text!r}: {reason}")
        waveform, rate_hz = soundfile.read(files["WAVE"], dtype="float32")
    return waveform, rate_hz


class _Event(ctypes.Structure):
    """`espeak_EVENT` of espeak-ng's speak_lib.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters from the start of the text, counted from 1
        ("length", ctypes.c_int),  # characters
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),  # the same, exact
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    )


# Constants of speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS, INITIALIZE_DONT_EXIT = 2, 0x8000
POS_CHARACTER, CHARS_UTF8 = 1, 1
EVENT_LIST_TERMINATED, EVENT_WORD = 0, 1
PARAMETER_RATE, PARAMETER_PITCH = 1, 3
_Samples, _Events = ctypes.POINTER(ctypes.c_short), ctypes.POINTER(_Event)
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, _Samples, ctypes.c_int, _Events)


@cache
def _espeak() -> tuple[ctypes.CDLL, int] | None:
    """The library, initialised, and its sample rate in Hz; None where it is not installed."""
    try:
        library = ctypes.CDLL("libespeak-ng.so.1")
    except OSError:
        return None
    rate_hz = library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, None, INITIALIZE_DONT_EXIT)
    return (library, rate_hz) if rate_hz > 0 else None


def speak_with_word_times(
    text: str, voice: str, *, rate: float = 1.0, pitch: int = 50
) -> tuple[NDArray[np.float32], int, list[tuple[str, float | None]]]:
    """Speaks with an espeak-ng voice ("en-us+f3"): waveform (S,) float32, its sample rate in Hz, word starts.

    The starts are espeak-ng's own events in seconds, one for each of `text.split()` in order; None for a word
    that it runs together with the one before, such as "the" in "of the". Not thread-safe: the library has one
    global state, and what it spoke before moves a start by up to a millisecond. Raises TrainingError where
    the library or the voice is missing, or the text holds no word.
    """
    if (espeak := _espeak()) is None:
        raise TrainingError("libespeak-ng.so.1 does not load; install Debian's package espeak-ng")
    library, rate_hz = espeak
    if library.espeak_SetVoiceByName(voice.encode()):
        raise TrainingError(f"espeak-ng has no voice {voice!r}; `espeak-ng --voices=en` lists its voices")
    library.espeak_SetParameter(PARAMETER_RATE, round(WORDS_PER_MINUTE * rate), 0)
    library.espeak_SetParameter(PARAMETER_PITCH, pitch, 0)
    pieces: list[NDArray[np.int16]] = []
    starts: list[tuple[int, int]] = []  # (character, sample) of each word event, both from 0

    def collect(samples: Any, num_samples: int, events: Any) -> int:
        if num_samples:
            pieces.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        index = 0
        while (event := events[index]).type != EVENT_LIST_TERMINATED:
            if event.type == EVENT_WORD and event.length:
                starts.append((event.text_position - 1, event.sample))
            index += 1
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    encoded = text.encode()
    size = ctypes.c_size_t(len(encoded) + 1)
    if library.espeak_Synth(encoded, size, 0, POS_CHARACTER, 0, CHARS_UTF8, None, None) or not starts:
        raise TrainingError(f"espeak-ng could not speak {text!r}")
    waveform = np.concatenate(pieces).astype(np.float32) / np.float32(32_768)
    return waveform, rate_hz, _place_words(text, starts, rate_hz)


def _place_words(text: str, starts: Sequence[tuple[int, int]], rate_hz: int) -> list[tuple[str, float | None]]:
    """Gives each word the first event inside it: a number has several, a word run together has none."""
    words = []
    for word in re.finditer(r"\S+", text):
        inside = [sample for character, sample in starts if word.start() <= character < word.end()]
        words.append((word.group(), min(inside) / rate_hz if inside else None))
    return words
