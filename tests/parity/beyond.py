"""What this package accepts and torch does not: the table in ``docs/beyond_torch.md``."""

import functools
import re
from pathlib import Path

TABLE = Path(__file__).resolve().parents[2] / "docs" / "beyond_torch.md"


@functools.cache
def _rows() -> list[tuple[str, frozenset[str]]]:
    """(how torch's message starts, the functions)"""
    cells = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    return [(row[0].strip().strip("`"), frozenset(re.findall(r"`(\w+)`", row[1]))) for row in cells]


def is_accepted(function: str, message: str) -> bool:
    return any(message.startswith(start) and function in functions for start, functions in _rows())
