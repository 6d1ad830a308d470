"""The form in which texts are compared."""

from svbatch.speech.readout import spoken_form

SPELLINGS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint", "ok": "okay"}


def normalised(text: str) -> str:
    """`text` in lower case without punctuation, words spelled out as in SPELLINGS."""
    return " ".join(SPELLINGS.get(word, word) for word in spoken_form(text).split())
