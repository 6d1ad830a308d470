import pytest

from svbatch.training.evaluate import normalised


@pytest.mark.parametrize(
    ("written", "compared"), [("Mr. O'Neil -- OK?", "mister o'neil okay"), ("St Paul's", "saint paul's"), ("", "")]
)
def test_texts_are_compared_in_spoken_form_with_abbreviations_spelled_out(written, compared):
    assert normalised(written) == compared
