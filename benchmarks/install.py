"""How long it takes to build and install the package from a clone, and how much it weighs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from benchmarks import machine
from benchmarks.harness import FOREIGN_SHARE, BenchmarkError, ForeignLoad

ROOT = Path(__file__).parent.parent


def measure(results: Path) -> None:
    """Writes ``results``/install.json: `pip install .` with build isolation in a fresh virtual environment.

    Without dependencies: PyTorch's size and the network would hide what is measured. With CUDA only where nvcc is.
    """
    variants = {"CPU only": "off"}
    if shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file():
        variants["with CUDA"] = "on"
    document = machine.describe("cpu") | {"command": "python -m benchmarks install"}
    document["rows"] = [_install(name, switch) for name, switch in variants.items()]
    path = results / "install.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {path}")


def _install(name: str, cuda: str) -> dict:
    print(f"install: {name}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        source, environment = Path(folder) / "source", Path(folder) / "venv"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
        venv.create(environment, with_pip=True)
        load, started = ForeignLoad(), time.perf_counter()
        done = subprocess.run(
            [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", str(source)],
            env=os.environ | {"CNN_EXT_CUDA": cuda},
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if done.returncode != 0:
            raise BenchmarkError(f"install: pip ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
        quiet = load.share() <= FOREIGN_SHARE
        [package] = environment.glob("lib/python*/site-packages/cnn_ext")
        size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
    return {
        "name": name,
        "seconds": seconds,
        "megabytes": size / 1e6,
        "rounds_accepted": int(quiet),
        "rounds_rejected": int(not quiet),
    }
