"""Geometric means of rows: over all of them, per operation, direction and layout, and per class within those."""

from statistics import geometric_mean

# Those with flushed caches are a GPU's, the share of an equal copy's speed is pooling's on one.
MEANS = ("speed_vs_torch", "speed_vs_best", "flushed_speed_vs_torch", "flushed_speed_vs_best", "share_of_copy")


def summarize(rows: list[dict]) -> dict:
    return {
        **_means(rows),
        "groups": [
            {
                "op": op,
                "direction": direction,
                "layout": layout,
                **_means(members),
                "classes": _means_by("class", members),
            }
            for (op, direction, layout), members in _grouped(rows, "op", "direction", "layout").items()
        ],
        "one_sample": _means_by("layout", [row for row in rows if row["batch"] == 1]),
        "worst": _worst(rows, "speed_vs_torch"),
        "worst_vs_best": _worst(rows, "speed_vs_best"),
        "under_foreign_load": sum(row["rounds_accepted"] == 0 for row in rows),
    }


def _worst(rows: list[dict], speed: str) -> dict:
    worst = min(rows, key=lambda row: row[speed])
    return {key: worst[key] for key in ("name", "direction", "layout", speed)}


def _means_by(key: str, rows: list[dict]) -> dict[str, dict]:
    return {name: {**_means(members), "rows": len(members)} for (name,), members in _grouped(rows, key).items()}


def _means(rows: list[dict]) -> dict[str, float]:
    return {name: geometric_mean([row[name] for row in rows]) for name in MEANS if name in rows[0]}


def _grouped(rows: list[dict], *keys: str) -> dict[tuple[str, ...], list[dict]]:
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
