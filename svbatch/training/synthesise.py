"""Speech made from written sentences, with a manifest that `svbatch train --data DIR` reads:

    python -m svbatch.training.synthesise --sentences jobs/train/sentences/* --output DIR --seed 1

Each sentence is spoken once, by a voice, rate and pitch drawn from the seed and the sentence. Run it again
with another seed to add the same sentences in other voices to the same folder. What the manifest lists is
never spoken twice, so a run that was killed is simply repeated.

Not covered: noise, rooms and telephone bands. Those are the trainer's augmentation.
"""

import argparse
import hashlib
import json
import logging
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from svbatch.errors import SvbatchError, TrainingError
from svbatch.training.json_lines import whole_lines
from svbatch.training.progress import with_progress
from svbatch.training.voices import SAMPLE_RATE_HZ, VOICES, Voice, choose_voices, missing_packages, speak

log = logging.getLogger(__name__)

RATES = (0.85, 1.2)  # drawn uniformly; 1 is the voice's own
PITCHES = (30, 70)  # drawn uniformly; 50 is the voice's own
OWN_KEYS = {"accent", "audio", "duration", "gender", "lang", "licence", "source", "speaker", "speech", "words"}


@dataclass(frozen=True)
class Utterance:
    """One sentence as it will be spoken; `labels` goes into the manifest unchanged."""

    text: str
    labels: dict[str, Any]
    voice: Voice
    rate: float
    pitch: int

    @property
    def audio(self) -> str:
        """File name relative to the manifest; another text, voice, rate or pitch gives another name."""
        spoken = f"{self.text}|{self.voice.speaker}|{self.rate}|{self.pitch}"
        return f"audio/{self.voice.speaker}/{hashlib.sha256(spoken.encode()).hexdigest()[:16]}.opus"


def synthesise(
    sentences: Sequence[Path],
    output: Path,
    *,
    voices: Sequence[Voice] = VOICES,
    seed: int = 0,
    limit: int | None = None,
) -> int:
    """Speaks the sentences of all files into `output` and returns how many were new.

    `limit` speaks that many of the sentences, drawn by the seed; None speaks all.
    Raises TrainingError for a bad line or a missing synthesiser before anything is spoken.
    """
    lines = read_sentences(sentences)
    if missing := missing_packages(voices):
        raise TrainingError(
            f"speech synthesis needs Debian's {', '.join(missing)}: `apt-get install {' '.join(missing)}`, "
            "or choose other voices by --voices"
        )
    utterances = [draw(text, labels, voices=voices, seed=seed) for text, labels in lines]
    random.Random(seed).shuffle(utterances)
    output.mkdir(parents=True, exist_ok=True)
    manifest = output / "manifest.jsonl"
    spoken = {json.loads(line)["audio"] for line in whole_lines(manifest)}
    new = [utterance for utterance in utterances[:limit] if utterance.audio not in spoken]
    with manifest.open("a", encoding="utf-8") as rows:
        for utterance in with_progress(new, "sentences"):
            rows.write(json.dumps(_write(utterance, output), ensure_ascii=False) + "\n")
            rows.flush()
    return len(new)


def read_sentences(paths: Iterable[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Text and labels of each line: of a `.jsonl` {"text": …, label: value}, else one sentence and no labels.

    Empty lines and lines that begin with # are skipped. Raises TrainingError naming file and line.
    """
    seen: dict[str, str] = {}
    sentences = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path}: sentences cannot be read: {error}") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.startswith("#"):
                continue
            where = f"{path}, line {number}"
            text, labels = _parse_labelled(line, where) if path.suffix == ".jsonl" else (line.strip(), {})
            if not text.isascii():
                strange = "".join(sorted({letter for letter in text if not letter.isascii()}))
                raise TrainingError(f"{where}: {strange}: not every voice reads it; write in plain ASCII")
            if text in seen:
                raise TrainingError(f"{where}: the same sentence as in {seen[text]}; remove one of them")
            seen[text] = where
            sentences.append((text, labels))
    return sentences


def _parse_labelled(line: str, where: str) -> tuple[str, dict[str, Any]]:
    try:
        labels = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{where}: not JSON: {error}") from error
    if not isinstance(labels, dict) or not isinstance(labels.get("text"), str) or not labels["text"].strip():
        raise TrainingError(f'{where}: expected an object with a "text" that is not empty')
    if taken := sorted(OWN_KEYS & labels.keys()):
        raise TrainingError(f"{where}: remove {', '.join(taken)}: the synthesiser writes it")
    return labels.pop("text").strip(), labels


def draw(text: str, labels: dict[str, Any], *, voices: Sequence[Voice], seed: int) -> Utterance:
    """Chooses a synthesiser, then one of its voices, rate and pitch, by the seed and the text alone.

    So neither the order of the sentences nor a limit changes how one of them is spoken, and the few voices of
    flite and festival, which sound more natural, are heard as often as the many of espeak-ng.
    """
    dice = random.Random(f"{seed} {text}")
    synthesiser = dice.choice(sorted({voice.synthesiser for voice in voices}))
    voice = dice.choice([voice for voice in voices if voice.synthesiser == synthesiser])
    return Utterance(text, labels, voice, round(dice.uniform(*RATES), 2), dice.randint(*PITCHES))


def _write(utterance: Utterance, output: Path) -> dict[str, Any]:
    """Speaks the utterance into its file and returns its row of the manifest."""
    voice = utterance.voice
    waveform, words = speak(utterance.text, voice, rate=utterance.rate, pitch=utterance.pitch)
    path = output / utterance.audio
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, SAMPLE_RATE_HZ, format="OGG", subtype="OPUS")
    row = {
        "audio": utterance.audio,
        "duration": round(len(waveform) / SAMPLE_RATE_HZ, 3),
        "text": utterance.text,
        "speaker": voice.speaker,
        "source": "synthesised",
        "licence": voice.licence,
        "lang": "en",
        "gender": voice.gender,
        "speech": True,
    }
    if voice.accent:
        row["accent"] = voice.accent
    if words:
        row["words"] = [{"word": word, "start": None if s is None else round(s, 3)} for word, s in words]
    return row | utterance.labels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m svbatch.training.synthesise",
        description="Speak written sentences in many voices, into Opus files and a manifest to train on.",
    )
    add = parser.add_argument
    add("--sentences", type=Path, nargs="+", required=True, metavar="FILE", help="one a line; .jsonl")
    add("--output", type=Path, required=True, metavar="DIR", help="folder for manifest.jsonl and audio/")
    add("--voices", nargs="+", metavar="VOICE", help="synthesisers or single voices (default: all)")
    add("--seed", type=int, default=0, help="draws the voices (default: 0)")
    add("--limit", type=int, metavar="N", help="speak only N sentences, drawn by the seed")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        voices = choose_voices(options.voices) if options.voices else VOICES
        new = synthesise(options.sentences, options.output, voices=voices, seed=options.seed, limit=options.limit)
    except SvbatchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    log.info("%d sentences spoken into %s", new, options.output / "manifest.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
