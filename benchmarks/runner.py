"""Runs a benchmark in processes of its own, one for each run and allocator, and writes what the middle run found.

glibc reads the choice of allocator from the environment when a process starts, so a second process does the measuring.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import conv2d, machine, mnist, peak, plots, pooling, views
from benchmarks.harness import Effort
from benchmarks.machine import ALLOCATORS
from benchmarks.options import DTYPES, LAYOUTS, Bench
from benchmarks.summary import summarize

SCHEMA = 1


def measure(benchmark: str, arguments: list[str], options: argparse.Namespace) -> None:
    """Measures with each allocator asked for, prints the table, writes the JSON file and pictures under ``--out``."""
    options.out.mkdir(parents=True, exist_ok=True)
    for allocator in ALLOCATORS if options.allocator == "both" else [options.allocator]:
        runs = [_in_own_process(benchmark, arguments, allocator) for _ in range(options.runs)]
        document = _middle(runs)
        document["command"] = shlex.join(["python", "-m", "benchmarks", benchmark, *arguments])
        document["allocator"] = allocator
        print(views.text(document))
        name = f"{benchmark}_winograd" if benchmark == "conv2d" and options.winograd else benchmark
        dtype = "" if options.dtype == "float32" else f"_{options.dtype}"
        stem = options.out / f"{name}_{options.device}_{allocator}{dtype}"
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        for path in [stem.with_suffix(".json"), *plots.draw(document, stem)]:
            print(f"wrote {path}")


def _in_own_process(benchmark: str, arguments: list[str], allocator: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks", benchmark, *arguments, "--worker", str(result)]
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
    bench = Bench(
        device=options.device,
        dtype=DTYPES[options.dtype],
        only=options.only,
        layouts=tuple(options.layout or LAYOUTS),
        effort=Effort(options.repeats, options.seconds),
        data_dir=options.data_dir,
        winograd=options.winograd,
    )
    document = {"schema": SCHEMA, "benchmark": options.command, "device": options.device, "dtype": options.dtype}
    document |= machine.describe(options.device)
    document["rows"] = rows = _rows(options, bench)
    document["peak"] = peak.machine_peaks(options.device, bench.timer, options.seconds)
    if options.command == "mnist":
        document["figure"] = next(row["time_vs_torch"] for row in rows if row["backend"] == "cnn_ext nchw")
    else:
        document["summary"] = summarize(rows)
        document["figure"] = document["summary"]["speed_vs_torch"]
    options.worker.write_text(json.dumps(document))


def _rows(options: argparse.Namespace, bench: Bench) -> list[dict]:
    if options.command == "conv2d":
        return conv2d.run(bench, tuple(options.direction or conv2d.DIRECTIONS))
    return pooling.run(bench) if options.command == "pooling" else mnist.run(bench)
