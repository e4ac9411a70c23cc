"""Writes a table of what each CUDA kernel uses, from the messages that record_ptxas.py kept beside the objects.

Usage: cuda_resources.py TABLE OBJECT...
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

_ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_HEADER = f"{'arch':6} {'registers':>9} {'spilled':>8} {'stack':>6} {'shared':>7}  kernel"


def demangled(symbols: list[str]) -> list[str]:
    """The symbols as C++ names without parameters, or as they are where no c++filt is."""
    if not symbols or shutil.which("c++filt") is None:
        return symbols
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [_shortened(name) for name in done.stdout.splitlines()]


def _shortened(name: str) -> str:
    for noise in ("void ", "cnn_ext::cuda::", "cnn_ext::", "(anonymous namespace)::"):
        name = name.replace(noise, "")
    return re.sub(r"\(Layout\)(\d)", lambda match: ("nchw", "nhwc")[int(match[1])], name).rsplit("(", 1)[0]


def rows(messages: str) -> list[str]:
    """One line of the table for each kernel and architecture."""
    entries = list(_ENTRY.finditer(messages))
    lines = []
    for entry, name in zip(entries, demangled([entry["symbol"] for entry in entries]), strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        memory = (
            f"{int(entry['stores']) + int(entry['loads']):>8} {entry['stack']:>6} {shared[1] if shared else '0':>7}"
        )
        lines.append(f"{entry['arch']:6} {entry['registers']:>9} {memory}  {name}")
    return lines


def main() -> None:
    table, *objects = map(Path, sys.argv[1:])
    messages = "".join(path.with_name(path.name + ".ptxas").read_text() for path in objects)
    table.write_text("\n".join([_HEADER, *sorted(rows(messages), key=lambda line: line.split(None, 5)[::-1])]) + "\n")


if __name__ == "__main__":
    main()
