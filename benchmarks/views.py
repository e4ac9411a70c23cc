"""A result document as text: what ran where, every row, and the means."""

from benchmarks.machine import headline
from benchmarks.tables import Column, plain

CONV2D_COLUMNS = [
    Column("case", lambda row: row["name"]),
    Column("class", lambda row: row["class"]),
    Column("direction", lambda row: row["direction"]),
    Column("layout", lambda row: row["layout"]),
    Column("ms", lambda row: row["ms"], ".4f"),
    Column("GFLOP/s", lambda row: row["gflops"], ".1f"),
    Column("of peak", lambda row: row["share_of_peak"], ".0%"),
    Column("vs torch", lambda row: row["speed_vs_torch"], ".2f"),
    Column("vs best", lambda row: row["speed_vs_best"], ".2f"),
    Column("kernel", lambda row: row["kernel"]),
    Column("", lambda row: _load_mark(row)),
]

POOLING_COLUMNS = [
    Column("case", lambda row: row["name"]),
    Column("class", lambda row: row["class"]),
    Column("direction", lambda row: row["direction"]),
    Column("layout", lambda row: row["layout"]),
    Column("ms", lambda row: row["ms"], ".4f"),
    Column("GB/s", lambda row: row["gbytes_per_s"], ".1f"),
    Column("torch GB/s", lambda row: row["torch_gbytes_per_s"], ".1f"),
    Column("vs torch", lambda row: row["speed_vs_torch"], ".2f"),
    Column("vs best", lambda row: row["speed_vs_best"], ".2f"),
    Column("", lambda row: _load_mark(row)),
]

MODEL_COLUMNS = [
    Column("what", lambda row: row["name"]),
    Column("who", lambda row: row["backend"]),
    Column("ms", lambda row: row["ms"], ".3f"),
    Column("time vs torch", lambda row: row["time_vs_torch"], ".3f"),
    Column("", lambda row: _load_mark(row)),
]

GROUP_COLUMNS = [
    Column("operation", lambda row: row["op"]),
    Column("direction", lambda row: row["direction"]),
    Column("layout", lambda row: row["layout"]),
    Column("class", lambda row: row["class"]),
    Column("rows", lambda row: row["rows"], "d"),
    Column("vs torch", lambda row: row["speed_vs_torch"], ".2f"),
    Column("vs best", lambda row: row["speed_vs_best"], ".2f"),
]

# Keys of a summary, the speed that they are about, and its name; older results lack the second.
WORST = (("worst", "speed_vs_torch", "vs torch"), ("worst_vs_best", "speed_vs_best", "vs best"))

# Only a GPU's rows have these.
CUDA_COLUMNS = {
    "flushed_ms": Column("flushed ms", lambda row: row["flushed_ms"], ".4f"),
    "flushed_speed_vs_torch": Column("flushed vs torch", lambda row: row["flushed_speed_vs_torch"], ".2f"),
    "flushed_speed_vs_best": Column("flushed vs best", lambda row: row["flushed_speed_vs_best"], ".2f"),
    "share_of_copy": Column("of an equal copy", lambda row: row["share_of_copy"], ".0%"),
    "launched_ms": Column("ms without a graph", lambda row: row.get("launched_ms"), ".3f"),
}

ROW_COLUMNS = {
    "conv2d": CONV2D_COLUMNS,
    "pooling": POOLING_COLUMNS,
    "mnist": MODEL_COLUMNS,
    "networks": MODEL_COLUMNS,
}


def text(document: dict) -> str:
    parts = [
        heading(document),
        plain(with_cuda(ROW_COLUMNS[document["benchmark"]], document["rows"]), document["rows"]),
    ]
    if "summary" in document:
        groups = group_rows(document["summary"])
        parts += [plain(with_cuda(GROUP_COLUMNS, groups), groups), verdict(document["summary"])]
    return "\n\n".join(parts) + "\n"


def with_cuda(columns: list[Column], rows: list[dict]) -> list[Column]:
    """The columns, and those of a GPU that the rows have."""
    return columns + [column for field, column in CUDA_COLUMNS.items() if any(field in row for row in rows)]


def heading(document: dict) -> str:
    peaks = ", ".join(f"{name.replace('_', ' ')} {value:.0f}" for name, value in document["peak"].items())
    return (
        f"{document['command']}\n"
        f"{headline(document)}\n"
        f"{peaks}\n"
        "speed of cnn_ext: vs torch in the same layout, vs best in torch's better layout; above 1 is faster"
    )


def group_rows(summary: dict) -> list[dict]:
    """The geometric means as rows: each class of a group, then the group as a whole."""
    rows = []
    for group in summary["groups"]:
        rows += [{**group, "class": name, **means} for name, means in sorted(group["classes"].items())]
        rows.append({**group, "class": "all", "rows": sum(c["rows"] for c in group["classes"].values())})
    return rows


def verdict(summary: dict) -> str:
    lines = [
        f"geometric mean of all rows: {summary['speed_vs_torch']:.2f} vs torch, {summary['speed_vs_best']:.2f} vs best",
        "; ".join(
            f"worst row: {worst['name']} {worst['direction']} {worst['layout']}, {worst[speed]:.2f} {words}"
            for key, speed, words in WORST
            if (worst := summary.get(key))
        ),
    ]
    lines += [
        f"one sample at a time, {layout}: {means['speed_vs_torch']:.2f} vs torch, {means['speed_vs_best']:.2f} vs best"
        f" ({means['rows']} rows)"
        for layout, means in summary.get("one_sample", {}).items()
    ]
    if summary["under_foreign_load"]:
        lines.append(f"{summary['under_foreign_load']} rows (!) were measured under foreign load: repeat them")
    return "\n".join(lines)


def _load_mark(row: dict) -> str:
    return "!" if row.get("rounds_accepted") == 0 else ""
