"""Geometric means of rows: over all of them, per operation, direction and layout, and per class within those."""

from statistics import geometric_mean

SPEEDS = ("speed_vs_torch", "speed_vs_best")


def summarize(rows: list[dict]) -> dict:
    worst = min(rows, key=lambda row: row["speed_vs_torch"])
    return {
        **_means(rows),
        "groups": [
            {"op": op, "direction": direction, "layout": layout, **_means(members), "classes": _classes(members)}
            for (op, direction, layout), members in _grouped(rows, "op", "direction", "layout").items()
        ],
        "worst": {key: worst[key] for key in ("name", "direction", "layout", "speed_vs_torch")},
        "under_foreign_load": sum(row["rounds_accepted"] == 0 for row in rows),
    }


def _classes(rows: list[dict]) -> dict[str, dict]:
    return {name: {**_means(members), "rows": len(members)} for (name,), members in _grouped(rows, "class").items()}


def _means(rows: list[dict]) -> dict[str, float]:
    return {speed: geometric_mean([row[speed] for row in rows]) for speed in SPEEDS}


def _grouped(rows: list[dict], *keys: str) -> dict[tuple[str, ...], list[dict]]:
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
