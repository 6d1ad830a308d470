"""Tables as Markdown has them."""

from collections.abc import Iterable, Sequence
from typing import Any

BAR = r"\|"  # one that ends no cell


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A line for the columns and one for each row, without a line break after the last."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', BAR) for cell in line)} |" for line in lines)
