"""Files of JSON lines that grow while something long runs, and may have been left in the middle of a line."""

import os
from pathlib import Path


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a file, none if it is not there. Half a line at its end, which a killed run left, is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[:whole].splitlines()
