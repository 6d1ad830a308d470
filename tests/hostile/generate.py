"""A corpus of broken recordings, made from a seed, and some good ones among them.

python tests/hostile/generate.py FOLDER [SEED]
"""

import io
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import soundfile
from numpy.random import Generator
from numpy.typing import NDArray

from svbatch.corpus.sound_files import _ogg_checksum

SOUND_FILES = {  # suffix of the name: format, subtype
    "wav": ("WAV", "PCM_16"),
    "float.wav": ("WAV", "FLOAT"),
    "rf64.wav": ("RF64", "PCM_16"),
    "aiff": ("AIFF", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "opus": ("OGG", "OPUS"),
    "ogg": ("OGG", "VORBIS"),
}
CONTAINERS = {  # suffix: muxer, codec, rate
    "m4a": ("ipod", "aac", 16_000),
    "mp4": ("mp4", "aac", 44_100),
    "mov": ("mov", "alac", 16_000),
    "3gp": ("3gp", "libopencore_amrnb", 8_000),
    "webm": ("webm", "libopus", 48_000),
    "mkv": ("matroska", "flac", 16_000),
    "mka": ("matroska", "libmp3lame", 16_000),
    "wma": ("asf", "wmav2", 16_000),
    "amr": ("amr", "libopencore_amrnb", 8_000),
    "aac": ("adts", "aac", 16_000),
}
FORMATS = (*SOUND_FILES, *CONTAINERS)
BOMB_HOURS = 13


@dataclass(frozen=True)
class Hostile:
    """Paths below one folder. What is `broken` need not be refused: a flipped bit in a WAV is a sound like another."""

    good: tuple[Path, ...]
    broken: tuple[Path, ...]


def generate(folder: Path, seed: int, *, bombs: bool = True) -> Hostile:
    """Writes `folder`/good and `folder`/broken. Without `bombs` it is done in seconds."""
    random = np.random.default_rng(seed)
    good_dir, broken_dir = folder / "good", folder / "broken"
    good_dir.mkdir(parents=True)
    broken_dir.mkdir()
    for number, suffix in enumerate(("wav", "flac", "mp3", "ogg", "opus", "m4a", "webm", "wma", "wav", "flac")):
        (good_dir / f"good-{number}.{suffix}").write_bytes(encoded(suffix, seed=100 + number))
    kinds = [_cut, _flipped, _lying_wav, _lying_flac, _lying_anything, _zero_frames, _not_finite, _rates, _channels]
    kinds += [_misnamed, _odd_names, *([_bombs] if bombs else [])]
    for kind in kinds:
        for number, (name, content) in enumerate(kind(random)):
            path = os.path.join(os.fsencode(broken_dir), f"{kind.__name__[1:]}-{number:03}.".encode() + name)
            with open(path, "wb") as file:
                file.write(content)
    _not_files(broken_dir)
    return Hostile(tuple(sorted(good_dir.iterdir())), tuple(sorted(broken_dir.iterdir())))


def sound(seed: int, duration_s: float = 1.5, rate: int = 16_000) -> NDArray[np.float32]:
    """(S,): bursts of a tone with a little noise."""
    random = np.random.default_rng(seed)
    times = np.arange(round(duration_s * rate)) / rate
    tone = np.sin(2 * np.pi * random.uniform(150, 900) * times) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * times))
    return (0.3 * tone + 0.003 * random.standard_normal(times.size)).astype(np.float32)


@cache
def encoded(suffix: str, *, seed: int = 0) -> bytes:
    """A good recording of a format."""
    if suffix in SOUND_FILES:
        container, subtype = SOUND_FILES[suffix]
        return written(sound(seed), 16_000, container, subtype)
    return muxed(suffix, sound(seed, rate=CONTAINERS[suffix][2])[None])


def muxed(suffix: str, samples: NDArray[np.float32], *, pause_s: float = 0.0) -> bytes:
    """Samples (channels, S) as one of CONTAINERS; after the first second the time stamps go on `pause_s` later."""
    muxer, codec, rate = CONTAINERS[suffix]
    layout = "mono" if len(samples) == 1 else "stereo"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12_200 if suffix in ("3gp", "amr") else 32_000
        context = stream.codec_context
        context.open()
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
        pieces = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size or 1024)
        for piece in [*pieces.resample(frame), *pieces.resample(None)]:
            piece.pts += round(pause_s * rate) if piece.pts >= rate else 0
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def written(samples: NDArray[np.floating], rate: int, container: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def _cut(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """In the header, at every eighth of the file, and just before its end."""
    for suffix in FORMATS:
        whole = encoded(suffix)
        for keep in (1, 4, 12, 30, 60, *(len(whole) * part // 8 for part in range(1, 8)), len(whole) - 1):
            yield suffix.encode(), whole[:keep]


def _flipped(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """One bit or some, in the header or anywhere."""
    for suffix in FORMATS:
        for number in range(8):
            content = bytearray(encoded(suffix))
            last = min(len(content), 80) if number % 2 else len(content)
            for at in random.integers(0, last, 1 + number // 2):
                content[at] ^= 1 << int(random.integers(8))
            yield suffix.encode(), bytes(content)


def _lying_wav(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """A WAV whose fields say something else: (offset, format, values)."""
    fields: list[tuple[int, str, list[int]]] = [
        (4, "<I", [0, 7, 2**31, 2**32 - 1]),  # of the whole
        (16, "<I", [0, 1, 15, 2**31, 2**32 - 1]),  # of the chunk fmt
        (20, "<H", [0, 2, 3, 6, 7, 17, 85, 0xFFFE, 0xFFFF]),  # the format
        (22, "<H", [0, 2, 3, 64, 1024, 0xFFFF]),  # channels
        (24, "<I", [0, 1, 1999, 4000, 384_000, 2**31, 2**32 - 1]),  # rate
        (32, "<H", [0, 1, 3, 0xFFFF]),  # bytes of a frame
        (34, "<H", [0, 1, 8, 12, 24, 32, 64, 0xFFFF]),  # bits
        (40, "<I", [0, 1, 3, 100, 2**31, 2**32 - 2, 2**32 - 1]),  # of the samples
    ]
    for offset, layout, values in fields:
        for value in values:
            content = bytearray(encoded("wav"))
            struct.pack_into(layout, content, offset, value)
            yield b"wav", bytes(content)


def _lying_flac(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """STREAMINFO that lies about the rate, channels, bits and length: 64 bits from byte 18 on."""
    rate, channels, bits, samples = 16_000, 1, 16, 24_000
    for lie in (
        *((value, channels, bits, samples) for value in (0, 1, 1999, 655_350, 2**20 - 1)),
        *((rate, value, bits, samples) for value in (2, 3, 8)),
        *((rate, channels, value, samples) for value in (4, 8, 24, 32)),
        *((rate, channels, bits, value) for value in (0, 1, 23_999, 24_001, 2**31, 2**36 - 1)),
    ):
        content = bytearray(encoded("flac"))
        packed = lie[0] << 44 | (lie[1] - 1) << 41 | (lie[2] - 1) << 36 | lie[3]
        struct.pack_into(">Q", content, 18, packed)
        yield b"flac", bytes(content)


def _lying_anything(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """Four bytes near the start of any format, all ones or all zeros."""
    for suffix in FORMATS:
        for fill in (b"\xff" * 4, bytes(4)):
            content = bytearray(encoded(suffix))
            at = int(random.integers(4, 120))
            content[at : at + 4] = fill
            yield suffix.encode(), bytes(content)


def _zero_frames(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    yield b"wav", b""
    for suffix in ("wav", "rf64.wav", "aiff", "flac", "opus", "ogg"):
        yield suffix.encode(), written(np.zeros(0), 16_000, *SOUND_FILES[suffix])


def _not_finite(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    for value in (np.nan, np.inf, -np.inf, 1e300):
        for at in (0, 11_999, 23_999):
            samples = sound(1).astype(np.float64)
            samples[at] = value
            yield b"double.wav", written(samples, 16_000, "WAV", "DOUBLE")


def _rates(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    for rate in (1, 2, 50, 999, 1999, 2000, 4000, 5512, 8000, 11_025, 22_050, 44_100, 96_000, 192_000, 384_000):
        yield b"wav", written(sound(2, 1.0, rate), rate)
        yield b"flac", written(sound(3, 0.5, rate), rate, "FLAC")


def _channels(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    for channels in (2, 3, 6, 8, 16, 32, 33, 64, 255, 1024):
        yield b"wav", written(np.repeat(sound(4)[:, None], channels, axis=1), 16_000)


def _misnamed(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """One format under another's name, and what is no sound at all."""
    for number, suffix in enumerate(FORMATS):
        yield FORMATS[(number + 5) % len(FORMATS)].encode(), encoded(suffix)
    yield b"wav", b"These are the minutes of the meeting.\n" * 50
    yield b"mp3", b"\x89PNG\r\n\x1a\n" + random.bytes(2000)
    yield b"m4a", b"PK\x03\x04" + random.bytes(2000)
    yield b"flac", random.bytes(5000)
    yield b"mp3", random.bytes(5000)
    yield b"m4a", b"#EXTM3U\n#EXTINF:3,\nfile:///etc/passwd\n"
    yield b"mp4", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield b"wav", bytes(100_000)
    yield b"mp3", b"ID3\x04\x00\x00\x7f\x7f\x7f\x7f" + bytes(1000)


def _odd_names(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    names = [b"new\nline", b"latin-\xfc", b"\xff\xfe", b"per%cent%0A", b"quote'\"", b"tab\t", b"space ", b"x" * 200]
    names += ["Grüße 你好 🎙".encode(), b"semi;colon|pipe", b"back\\slash", b"\x1b[31mred", b"a#t=1,2", b"[glob]*?"]
    for name in names:
        yield name + b".wav", encoded("wav", seed=7)
        yield name + b".cut.flac", encoded("flac")[:500]


def _bombs(random: Generator) -> Iterator[tuple[bytes, bytes]]:
    """BOMB_HOURS in a small file, with a header that says so and with one that does not."""
    flac = io.BytesIO()
    with soundfile.SoundFile(flac, "w", 8_000, 1, "PCM_16", format="FLAC") as file:
        for _ in range(BOMB_HOURS * 60):
            file.write(np.zeros(8_000 * 60, np.int16))
    content = bytearray(flac.getvalue())
    yield b"flac", bytes(content)
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    yield b"stream.flac", bytes(content)
    yield b"opus", _opus_bomb(is_honest=True)
    yield b"liar.opus", _opus_bomb(is_honest=False)
    silence = written(np.zeros(8_000 * 4), 8_000, "MP3", "MPEG_LAYER_III")
    frames = silence[len(silence) // 2 :]
    frames = frames[frames.index(silence[:2]) :]
    yield b"mp3", frames * (BOMB_HOURS * 3600 // 2)


def _opus_bomb(*, is_honest: bool) -> bytes:
    """Packets of one byte that stand for 120 ms each."""
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 48_000, 0, 0)
    tags = b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)
    pages = [_page(2, 0, 0, [head]), _page(0, 0, 1, [tags])]
    num_pages = BOMB_HOURS * 3600 * 1000 // 120 // 255 + 1
    for number in range(1, num_pages + 1):
        granule = number * 255 * 5760 if is_honest else number
        flags = 4 if number == num_pages else 0
        pages.append(_page(flags, granule, number + 1, [b"\x19"] * 255))
    return b"".join(pages)


def _page(flags: int, granule: int, sequence: int, packets: list[bytes]) -> bytes:
    lacing = bytes(len(packet) for packet in packets)
    header = b"OggS" + struct.pack("<BBqIII", 0, flags, granule, 1, sequence, 0) + bytes([len(lacing)]) + lacing
    page = header + b"".join(packets)
    return page[:22] + _ogg_checksum(page) + page[26:]


def _not_files(folder: Path) -> None:
    """What is named like a recording and is none."""
    os.mkfifo(folder / "fifo.wav")
    (folder / "folder.wav").mkdir()
    (folder / "nowhere.wav").symlink_to("lost.wav")
    (folder / "itself.wav").symlink_to("itself.wav")
    (folder / "one.wav").symlink_to("two.wav")
    (folder / "two.wav").symlink_to("one.wav")
    (folder / "loop").symlink_to(folder)
    (folder / "device.wav").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(folder)  # the address of a socket is short
        try:
            listener.bind("socket.wav")
        finally:
            os.chdir(here)
    if os.geteuid():
        (folder / "forbidden.wav").write_bytes(encoded("wav"))
        (folder / "forbidden.wav").chmod(0)


if __name__ == "__main__":
    made = generate(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(f"{len(made.good)} good, {len(made.broken)} broken recordings in {sys.argv[1]}")
