"""Runs the compiler command given; keeps the assembler's figures in <object>.ptxas and passes the other messages on."""

import re
import subprocess
import sys
from pathlib import Path

_FIGURES = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def main() -> int:
    command = sys.argv[1:]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines(keepends=True)
    if "-o" in command:
        target = Path(command[command.index("-o") + 1])
        target.with_name(target.name + ".ptxas").write_text("".join(line for line in lines if _FIGURES.match(line)))
    sys.stderr.writelines(line for line in lines if not _FIGURES.match(line))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
