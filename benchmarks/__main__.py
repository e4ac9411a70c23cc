"""``python -m benchmarks COMMAND``: benchmarks/README.md lists the commands."""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import install, memory, models, network_layers, overhead, report, rows, runner
from benchmarks.cases import LAYERS
from benchmarks.conv2d import DIRECTIONS
from benchmarks.harness import BenchmarkError
from benchmarks.machine import ALLOCATORS
from benchmarks.options import DTYPES, EFFORTS, LAYOUTS, require_device

BENCHMARKS = {"cpu": ("conv2d", "pooling", "mnist", "networks"), "cuda": ("conv2d", "pooling", "mnist")}
RESULTS = Path(__file__).parent / "results"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="cnn_ext against torch: benchmarks/README.md")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*BENCHMARKS["cpu"], "all"):
        measure = commands.add_parser(name, help=f"measure {name}")
        measure.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        measure.add_argument(
            "--dtype",
            choices=tuple(DTYPES),
            action="append",
            help="of conv2d and pooling; default: float32, on a GPU (as TF32) and bfloat16",
        )
        measure.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (%(default)s)")
        measure.add_argument("--only", metavar="REGEX", help="cases whose name matches")
        measure.add_argument(
            "--layers", choices=LAYERS, default="conv2d", help="of conv2d: the list that is measured (%(default)s)"
        )
        measure.add_argument("--layout", choices=tuple(LAYOUTS), action="append", help="default: both")
        measure.add_argument("--direction", choices=DIRECTIONS, action="append", help="of conv2d; default: all")
        measure.add_argument(
            "--winograd", action="store_true", help="of conv2d: the layers that take it, in a file of their own"
        )
        measure.add_argument("--allocator", choices=(*ALLOCATORS, "both"), default="nofault")
        measure.add_argument("--runs", type=int, default=1, help="the middle one is quoted (%(default)s)")
        cpu, cuda = EFFORTS["cpu"], EFFORTS["cuda"]
        measure.add_argument("--repeats", type=int, help=f"rounds of a comparison ({cpu.repeats}, GPU: {cuda.repeats})")
        measure.add_argument("--seconds", type=float, help=f"limit of one ({cpu.seconds}, GPU: {cuda.seconds})")
        measure.add_argument("--data-dir", help="where MNIST/raw is; default: $CNN_EXT_DATA, ./data, ../shared/data")
        measure.add_argument("--worker", nargs=2, metavar=("FILE", "DTYPE"), help=argparse.SUPPRESS)
    checker = commands.add_parser("rows", help="check every kernel against float64")
    checker.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    checker.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    checker.add_argument("--only", metavar="REGEX", help="kernels whose name matches")
    checker.add_argument("--processes", type=int, help="default: one for each core, where pytest-xdist is installed")
    keeper = commands.add_parser("memory", help="measure what training whole networks keeps and its peak memory")
    keeper.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    installer = commands.add_parser("install", help="measure building and installing from a clone")
    installer.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    caller = commands.add_parser("overhead", help="measure what an eager call costs above its kernel")
    caller.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    zoo = commands.add_parser("models", help="compare converted models of torchvision and timm with the originals")
    zoo.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (%(default)s)")
    zoo.add_argument("--only", metavar="REGEX", default="", help="architectures whose name matches")
    zoo.add_argument("--resume", action="store_true", help="leave out, and keep, what the result has already")
    commands.add_parser("network-layers", help="write shapes/networks.csv anew; needs torchvision")
    writer = commands.add_parser("report", help="write the recorded results into README.md")
    writer.add_argument("--results", type=Path, default=RESULTS)
    writer.add_argument("--readme", type=Path, default=Path(__file__).parent.parent / "README.md")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "report":
            report.write(options.results, options.readme)
            return 0
        if options.command == "models":
            return models.measure(options.out, options.only, options.resume)
        if options.command == "network-layers":
            network_layers.write()
            return 0
        if options.command == "overhead":
            overhead.measure(options.out)
            return 0
        if options.command == "memory":
            memory.measure(options.out)
            return 0
        if options.command == "install":
            install.measure(options.out)
            return 0
        require_device(options.device)
        if options.command == "rows":
            return rows.measure(options.device, options.out, options.only, options.processes, arguments[1:])
        if options.worker:
            runner.work(options)
            return 0
        if options.command == "all" and options.device == "cuda":
            os.environ["CNN_EXT_UNPROVEN"] = "1"  # what is right in this run is measured in it
            if rows.measure("cuda", options.out, None, None, arguments[1:]):
                return 1  # a wrong kernel's speed is no figure
        failures = [
            failure
            for benchmark, arguments_of_it, options_of_it in _measured(options, arguments[1:])
            for failure in runner.measure(benchmark, arguments_of_it, options_of_it)
        ]
        print("".join(f"benchmarks: not measured: {failure}\n" for failure in failures), end="", file=sys.stderr)
        return 1 if failures else 0
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _measured(options: argparse.Namespace, arguments: list[str]) -> list[tuple[str, list[str], argparse.Namespace]]:
    """The benchmarks of a command, each with its arguments; ``all`` on a CPU: Winograd's algorithm, too."""
    if options.command != "all":
        return [(options.command, arguments, options)]
    measured = [(benchmark, arguments, options) for benchmark in BENCHMARKS[options.device]]
    if options.device == "cpu" and not options.winograd:
        allowed = argparse.Namespace(**{**vars(options), "winograd": True, "dtype": ["float32"]})
        measured.append(("conv2d", [*arguments, "--winograd"], allowed))
    return measured


if __name__ == "__main__":
    sys.exit(main())
