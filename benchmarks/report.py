"""Writes the recorded results into README.md, between its markers: no figure there is written by hand."""

import json
import os
import re
import statistics
from pathlib import Path

from benchmarks import plots, views
from benchmarks.harness import BenchmarkError
from benchmarks.machine import headline
from benchmarks.tables import Column, markdown

LECTURE_ACCURACY = 0.9914

PEAK_OF_A_GPU = (
    " Times are of CUDA graphs with warm caches; *flushed* is one call after the level 2 cache was overwritten. Beside"
    " them, torch's large matrix product ran at {gemm_gflops:.0f} GFLOP/s and a copy at {memory_gbytes_per_s:.0f} GB/s."
)

GROUP_COLUMNS = [
    Column("operation", lambda row: f"`{row['op']}`"),
    Column("direction", lambda row: f"`{row['direction']}`"),
    Column("layout", lambda row: row["layout"]),
    Column("layers", lambda row: row["rows"], "d"),
    Column("against torch, same layout", lambda row: row["speed_vs_torch"], ".2f"),
    Column("against torch, its better layout", lambda row: row["speed_vs_best"], ".2f"),
]

MODEL_COLUMNS = [
    Column("", lambda row: row["name"]),
    Column("", lambda row: row["backend"]),
    Column("seconds", lambda row: row["ms"] / 1000, ".4g"),
    Column("share of the first line's time", lambda row: row["time_vs_torch"], ".3f"),
]

MEMORY_COLUMNS = [
    Column("network", lambda row: f"{row['network']}, batch {row['batch_size']}"),
    Column("layers of", lambda row: row["backend"]),
    Column("MB kept for backward", lambda row: row["saved_mb"], ".0f"),
    Column("of torch's", lambda row: row["saved_vs_torch"], ".3f"),
    Column("MB needed at the peak", lambda row: row.get("needed_mb"), ".0f"),
    Column("of torch's", lambda row: row.get("needed_vs_torch"), ".3f"),
    Column("MB resident at the peak", lambda row: row["peak_mb"], ".0f"),
    Column("of torch's", lambda row: row["peak_vs_torch"], ".3f"),
]

INSTALL_COLUMNS = [
    Column("build and install", lambda row: row["name"]),
    Column("seconds", lambda row: row["seconds"], ".0f"),
    Column("MB installed", lambda row: row["megabytes"], ".1f"),
]

SEED_COLUMNS = [
    Column("layers of", lambda row: f"`{row['backend']}`"),
    Column("seed", lambda row: row["seed"], "d"),
    Column("epochs", lambda row: row["epochs"], "d"),
    Column("test accuracy", lambda row: row["accuracy"], ".4f"),
]


def write(results: Path, readme: Path) -> None:
    text = readme.read_text()
    text = _between(text, "benchmarks", _benchmarks_block(results, readme.parent))
    text = _between(text, "mnist", _mnist_block(results, readme.parent))
    text = _between(text, "install", _install_block(results, readme.parent))
    readme.write_text(text)
    print(f"wrote {readme}")


def _between(text: str, marker: str, block: str) -> str:
    """``text`` with what stands between the two marker comments replaced; a missing or doubled marker is an error."""
    pattern = re.compile(rf"(<!-- {marker}:begin -->\n).*?(<!-- {marker}:end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        markers = f"<!-- {marker}:begin --> and <!-- {marker}:end -->"
        raise BenchmarkError(f"report: expected {markers} once each in the README, each on a line of its own")
    return pattern.sub(lambda found: f"{found[1]}{block}\n{found[2]}", text)


def _benchmarks_block(results: Path, root: Path) -> str:
    """The records in ``results``, then those of machines that have a folder in it: their tables, without pictures."""
    parts = [part for path in sorted(results.glob("*.json")) for part in _of_file(path, root)]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        tables = [part for path in sorted(folder.glob("*.json")) for part in _of_file(path, root, pictures=False)]
        parts += [f"### {folder.name}", *tables] if tables else []
    return "\n\n".join(parts) if parts else "No results are recorded yet."


def _of_file(path: Path, root: Path, pictures: bool = True) -> list[str]:
    document = json.loads(path.read_text())
    if "benchmark" not in document:
        return []
    return _of_document(document, path, root) + (_pictures(path, root) if pictures and _has_pictures(document) else [])


def _has_pictures(document: dict) -> bool:
    return "figures_of_runs" in document and not _is_verdict_alone(document)


def _is_verdict_alone(document: dict) -> bool:
    """Whether one line stands for the document: another dtype than float32, on a CPU."""
    return document["device"] == "cpu" and document.get("dtype", "float32") != "float32"


def _of_document(document: dict, path: Path, root: Path) -> list[str]:
    source = f"[file]({_link(path, root)}), `{document['command']}`"
    if document["benchmark"] == "rows":
        return [_kernels_line(document, source)]
    if document["benchmark"] == "memory":
        return [
            f"**memory** of a training step, {headline(document)} ({source})",
            _table(MEMORY_COLUMNS, document["rows"]),
        ]
    runs = document["figures_of_runs"]
    quoted = f"the middle one of {len(runs)} runs" if len(runs) > 1 else "one run"
    in_dtype = f" in {document['dtype']}" if _is_verdict_alone(document) else ""
    name = f"**{document.get('name', document['benchmark'])}**{in_dtype}"
    head = f"{name}, {headline(document)}, {quoted} ({source})"
    if in_dtype:
        return [f"{head}: {views.verdict(document['summary']).splitlines()[0]}."]
    if "summary" not in document:
        return [head, _table(MODEL_COLUMNS, document["rows"])]
    columns, groups = _groups(document)
    verdict = "; ".join(views.verdict(document["summary"]).splitlines())
    means = f"Speeds are geometric means; above 1, cnn_ext is faster. {verdict.capitalize()}."
    means += PEAK_OF_A_GPU.format(**document["peak"]) if document["device"] == "cuda" else ""
    return [head, _table(columns, groups), means]


def _groups(document: dict) -> tuple[list[Column], list[dict]]:
    """The means of each operation, direction and layout; of Winograd's algorithm those of the classes, too."""
    rows = views.group_rows(document["summary"])
    if document.get("name", "").endswith("_winograd"):
        return [*GROUP_COLUMNS[:3], Column("layers of", lambda row: row["class"]), *GROUP_COLUMNS[3:]], rows
    return GROUP_COLUMNS, [row for row in rows if row["class"] == "all"]


def _table(columns: list[Column], rows: list[dict]) -> str:
    return markdown(views.with_cuda(columns, rows), rows)


def _kernels_line(document: dict, source: str) -> str:
    rows, tests = len(document["rows"]), sum(row["passed"] for row in document["rows"])
    wrong = [row["name"] for row in document["rows"] if not row["right"]]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "all right"
    where = document["machine"]["gpu"] or document["machine"]["cpu"]
    checked = f"{rows} in {tests} tests against float64, {verdict}"
    return f"**kernels**, {where}, {document['date'][:10]}: {checked} ({source})"


def _install_block(results: Path, root: Path) -> str:
    path = results / "install.json"
    if not path.is_file():
        return "No installation is recorded yet."
    document = json.loads(path.read_text())
    machine = document["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, {document['date'][:10]}, `{document['command']}`"
    return "\n\n".join([markdown(INSTALL_COLUMNS, document["rows"]), f"({where})"])


def _pictures(path: Path, root: Path) -> list[str]:
    others = [other.stem for other in path.parent.glob(f"{path.stem}_*.json")]  # whose names begin alike
    found = [
        picture
        for picture in sorted(path.parent.glob(f"{path.stem}_*.png"))
        if not any(picture.stem.startswith(f"{other}_") for other in others)
    ]
    return [f"![{picture.stem.replace('_', ' ')}]({_link(picture, root)})" for picture in found]


def _link(path: Path, root: Path) -> str:
    return os.path.relpath(path, root)


def _mnist_block(results: Path, root: Path) -> str:
    histories = _histories(results)
    if not histories:
        return "No runs are recorded yet."
    rows = [
        {
            "backend": backend,
            "seed": run["arguments"]["seed"],
            "epochs": len(run["train_loss"]),
            "accuracy": run["test_accuracy"],
        }
        for backend, runs in histories.items()
        for run in runs
    ]
    picture = results / "mnist_curves.png"
    plots.mnist_curves(histories).savefig(picture, dpi=110)
    lines = [_mean_line(backend, runs) for backend, runs in histories.items()]
    lines.append(f"- the lecture's run: {LECTURE_ACCURACY:.4f}")
    return "\n\n".join([markdown(SEED_COLUMNS, rows), "\n".join(lines), f"![curves]({_link(picture, root)})"])


def _mean_line(backend: str, runs: list[dict]) -> str:
    accuracies = [run["test_accuracy"] for run in runs]
    line = f"- `{backend}`: mean test accuracy {statistics.mean(accuracies):.4f}"
    if len(accuracies) > 1:
        line += f", standard error {statistics.stdev(accuracies) / len(accuracies) ** 0.5:.4f}"
    return f"{line} ({len(accuracies)} seed{'s' if len(accuracies) > 1 else ''})"


def _histories(results: Path) -> dict[str, list[dict]]:
    """The finished runs of ``cnn-ext train``, files mnist_<backend>_seed<k>.json, by backend and then by seed."""
    histories: dict[str, list[dict]] = {}
    for path in sorted(results.glob("mnist_*_seed*.json")):
        run = json.loads(path.read_text())
        if run["test_accuracy"] is None:
            raise BenchmarkError(f"report: {path} is of a run that did not finish")
        histories.setdefault(run["backend"], []).append(run)
    return {backend: sorted(runs, key=lambda run: run["arguments"]["seed"]) for backend, runs in histories.items()}
