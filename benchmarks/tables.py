"""Rows of dictionaries as aligned text for a terminal, or as a Markdown table."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    title: str
    value: Callable[[dict], object]
    format: str = ""

    def text(self, row: dict) -> str:
        """Nothing where a row has no such value."""
        value = self.value(row)
        return "" if value is None else format(value, self.format)

    @property
    def is_number(self) -> bool:
        return self.format.endswith(("f", "g", "%", "d"))


def plain(columns: list[Column], rows: list[dict]) -> str:
    lines = [[column.title for column in columns], *([column.text(row) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def aligned(line: list[str]) -> str:
        cells = zip(columns, line, widths, strict=True)
        return "  ".join(f"{cell:>{w}}" if column.is_number else f"{cell:<{w}}" for column, cell, w in cells).rstrip()

    return "\n".join([aligned(lines[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(aligned, lines[1:])])


def markdown(columns: list[Column], rows: list[dict]) -> str:
    head = "| " + " | ".join(column.title for column in columns) + " |"
    rule = "|" + "|".join("---:" if column.is_number else "---" for column in columns) + "|"
    body = ["| " + " | ".join(column.text(row) for column in columns) + " |" for row in rows]
    return "\n".join([head, rule, *body])
