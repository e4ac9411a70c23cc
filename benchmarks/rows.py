"""Every kernel of a device over the shared cases, in every dtype and layout, against float64: tests/test_kernels.py.

On a GPU the result is the proof that a kernel has run and was right, without which some are not chosen: the next build
reads ``benchmarks/results/rows_cuda.json`` (cmake/proven_rows.cmake).
"""

import importlib.util
import json
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.tables import Column, plain
from cnn_ext import kernels

MOST_PROCESSES = 14  # each has a context of its own on a GPU
TESTS = Path(__file__).parent.parent / "tests" / "test_kernels.py"

COLUMNS = [
    Column("kernel", lambda row: row["name"]),
    Column("tests passed", lambda row: row["passed"], "d"),
    Column("failed", lambda row: row["failed"], "d"),
    Column("", lambda row: "right" if row["right"] else "WRONG"),
]


class _Outcomes:
    """A pytest plugin that counts what became of each kernel's tests, whichever process ran them."""

    def __init__(self, names: list[str]):
        self.names, self.passed, self.failed = names, Counter(), Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = self._kernel(report.nodeid)
        if name in self.names and (report.when == "call" or report.failed):
            (self.passed if report.passed else self.failed)[name] += 1

    @staticmethod
    def _kernel(test: str) -> str:
        """The first of the test's parameters."""
        return test.rpartition("[")[2].rstrip("]").split("-")[0]


def _in_parallel(processes: int | None) -> list[str]:
    """pytest's arguments: a process for each core, unless ``processes`` says how many."""
    if importlib.util.find_spec("xdist") is None or processes == 1:
        return []
    return ["-n", str(processes or "auto"), "--maxprocesses", str(MOST_PROCESSES)]


def measure(device: str, results: Path, only: str | None, processes: int | None, arguments: list[str]) -> int:
    """Writes ``results``/rows_<device>.json; 1 where a kernel is wrong."""
    names = [
        row.name for row in kernels() if row.device == device and row.supported and re.search(only or "", row.name)
    ]
    outcomes = _Outcomes(names)
    chosen = ["-k", " or ".join(names)]  # whose names contain one of these
    pytest.main([str(TESTS), "-q", "-p", "no:cacheprovider", *chosen, *_in_parallel(processes)], plugins=[outcomes])
    rows = [
        {
            "name": name,
            "passed": outcomes.passed[name],
            "failed": outcomes.failed[name],
            "right": outcomes.passed[name] > 0 and outcomes.failed[name] == 0,
        }
        for name in names
    ]
    document = {"benchmark": "rows", "device": device, **machine.describe(device), "rows": rows}
    document["command"] = shlex.join(["python", "-m", "benchmarks", "rows", *arguments])
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"rows_{device}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(plain(COLUMNS, rows), f"\nwrote {path}")
    return 0 if all(row["right"] for row in rows) else 1
