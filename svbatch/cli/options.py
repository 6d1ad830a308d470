"""Options that take more than a word: a length of time, a moment, a part of a whole."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType[float]):
    """90s, 30m, 2h or 7d, as seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", value) if isinstance(value, str) else None
        if found is None:
            self.fail(f"{value!r} is not a length of time; write 90s, 30m, 2h or 7d", param, ctx)
        return float(found[1]) * SECONDS[found[2]]


class Moment(click.ParamType[datetime]):
    """A date, a date with a time (UTC unless it says otherwise), or a duration before now."""

    name = "date or duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            try:
                ago = timedelta(seconds=Duration().convert(value, None, None))
                return datetime.now(UTC) - ago
            except (click.BadParameter, OverflowError):
                self.fail(f"{value!r} is no moment; write 2026-01-31, 2026-01-31T22:00 or 24h", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Shard(click.ParamType[tuple[int, int]]):
    """i/n with 1 <= i <= n, as a pair."""

    name = "i/n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", value)
        if found is None or int(found[1]) > int(found[2]):
            self.fail(f"{value!r} is no shard; write 1/4, 2/4, 3/4 and 4/4 for four", param, ctx)
        return int(found[1]), int(found[2])
