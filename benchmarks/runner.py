"""Runs a benchmark in processes of its own, one for each run and allocator, and writes what the middle run found.

glibc reads the choice of allocator from the environment when a process starts, so a second process does the measuring;
a GPU is measured in this one.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import geometric_mean

from benchmarks import conv2d, machine, mnist, plots, pooling, views, whole_networks
from benchmarks.harness import BenchmarkError, Effort
from benchmarks.machine import ALLOCATORS
from benchmarks.options import DEFAULT_DTYPES, DTYPES, EFFORTS, LAYOUTS, Bench
from benchmarks.summary import summarize

SCHEMA = 1

WHOLE_MODELS = ("mnist", "networks")  # whose rows are times of contenders, in float32
QUOTED_CONTENDER = "cnn_ext nchw"  # of those


def measure(benchmark: str, arguments: list[str], options: argparse.Namespace) -> list[str]:
    """Measures in each dtype and with each allocator asked for, prints the tables, writes the JSON files and pictures
    under ``--out``; the failures of rows that are left out."""
    options.out.mkdir(parents=True, exist_ok=True)
    dtypes = options.dtype or DEFAULT_DTYPES[options.device]
    failures = []
    for dtype in ["float32"] if benchmark in WHOLE_MODELS else dtypes:
        for allocator in _allocators(options):
            runs = [_run(benchmark, arguments, options, dtype, allocator) for _ in range(options.runs)]
            document = _middle(runs)
            document["command"] = shlex.join(["python", "-m", "benchmarks", benchmark, *arguments])
            document["allocator"] = allocator
            _write(document, options)
            failures += document["failures"]
    return failures


def _allocators(options: argparse.Namespace) -> list[str | None]:
    """The names of glibc's settings; they play no part in what a GPU does."""
    if options.device == "cuda":
        return [None]
    return list(ALLOCATORS) if options.allocator == "both" else [options.allocator]


def _write(document: dict, options: argparse.Namespace) -> None:
    """The table to the terminal, the rest under ``--out``."""
    print(views.text(document))
    dtype = None if document["dtype"] == "float32" else document["dtype"]
    stem = options.out / "_".join(filter(None, (document["name"], options.device, document["allocator"], dtype)))
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    for path in [stem.with_suffix(".json"), *plots.draw(document, stem)]:
        print(f"wrote {path}")


def _name(benchmark: str, options: argparse.Namespace) -> str:
    """The benchmark, with what was asked of it: conv2d, conv2d_networks, conv2d_winograd, conv2d_networks_winograd."""
    if benchmark != "conv2d":
        return benchmark
    layers = [] if options.layers == "conv2d" else [options.layers]
    return "_".join(["conv2d", *layers, *(["winograd"] if options.winograd else [])])


def _run(benchmark: str, arguments: list[str], options: argparse.Namespace, dtype: str, allocator: str | None) -> dict:
    if options.device == "cuda":  # one process: a context of the GPU takes seconds to make
        return document_of(benchmark, dtype, options)
    return _in_own_process(benchmark, arguments, dtype, allocator)


def _in_own_process(benchmark: str, arguments: list[str], dtype: str, allocator: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks", benchmark, *arguments, "--worker", str(result), dtype]
        done = subprocess.run(command, env=machine.allocator_environment(allocator), check=False)
        if done.returncode != 0:
            sys.exit(done.returncode)  # it has said why
        return json.loads(result.read_text())


def _middle(runs: list[dict]) -> dict:
    """The run with the median overall figure, and the figures of all runs."""
    ordered = sorted(runs, key=lambda run: run["figure"])
    return ordered[(len(runs) - 1) // 2] | {"figures_of_runs": [run["figure"] for run in runs]}


def work(options: argparse.Namespace) -> None:
    """The measuring process: one run of one benchmark into a JSON file."""
    path, dtype = options.worker
    Path(path).write_text(json.dumps(document_of(options.command, dtype, options)))


def document_of(benchmark: str, dtype: str, options: argparse.Namespace) -> dict:
    """What one run of a benchmark found."""
    effort = EFFORTS[options.device]
    bench = Bench(
        device=options.device,
        dtype=DTYPES[dtype],
        only=options.only,
        layouts=tuple(options.layout or LAYOUTS),
        effort=Effort(options.repeats or effort.repeats, options.seconds or effort.seconds),
        data_dir=options.data_dir,
        layers=options.layers,
        winograd=options.winograd,
    )
    document = {"schema": SCHEMA, "benchmark": benchmark, "device": options.device, "dtype": dtype}
    document["name"] = _name(benchmark, options)
    document |= machine.describe(options.device)
    document["rows"] = rows = _rows(benchmark, options, bench)
    document["failures"] = bench.failures
    document["peak"] = bench.peaks
    if benchmark in WHOLE_MODELS:
        document["figure"] = geometric_mean(row["time_vs_torch"] for row in rows if row["backend"] == QUOTED_CONTENDER)
    else:
        document["summary"] = summarize(rows)
        document["figure"] = document["summary"]["speed_vs_torch"]
    return document


def _rows(benchmark: str, options: argparse.Namespace, bench: Bench) -> list[dict]:
    runs = {
        "conv2d": lambda: conv2d.run(bench, tuple(options.direction or conv2d.DIRECTIONS)),
        "pooling": lambda: pooling.run(bench),
        "mnist": lambda: mnist.run(bench),
        "networks": lambda: whole_networks.run(bench),
    }
    rows = runs[benchmark]()
    if not rows:
        raise BenchmarkError("; ".join(bench.failures))
    return rows
