from datetime import UTC, datetime, timedelta

import click
import pytest

from svbatch.cli.options import Duration, Moment, Shard


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5h", 5400), ("7d", 604_800)]
)
def test_a_duration_has_its_unit(text, seconds):
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "2 h", "2h30m", "1e3s", "٣h"])
def test_another_text_is_no_duration(text):
    with pytest.raises(click.BadParameter, match="write 90s, 30m, 2h or 7d"):
        Duration().convert(text, None, None)


def test_a_moment_is_a_date_a_time_or_a_length_before_now():
    def moment(text: str) -> datetime:
        return Moment().convert(text, None, None)

    assert moment("2026-01-31") == datetime(2026, 1, 31, tzinfo=UTC)
    assert moment("2026-01-31T22:00+02:00") == datetime(2026, 1, 31, 20, tzinfo=UTC)
    assert abs(datetime.now(UTC) - timedelta(days=1) - moment("24h")) < timedelta(seconds=5)
    for text in ("yesterday", "2026-13-01", "99999999999d", ""):
        with pytest.raises(click.BadParameter, match="write 2026-01-31, 2026-01-31T22:00 or 24h"):
            moment(text)


@pytest.mark.parametrize(("text", "pair"), [("1/1", (1, 1)), ("2/3", (2, 3)), ("12/100", (12, 100))])
def test_a_shard_is_one_of_so_many(text, pair):
    assert Shard().convert(text, None, None) == pair


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "-1/3", "1/3/5", "a/b"])
def test_another_text_is_no_shard(text):
    with pytest.raises(click.BadParameter, match="write 1/4, 2/4, 3/4 and 4/4 for four"):
        Shard().convert(text, None, None)
