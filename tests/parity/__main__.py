"""``python -m tests.parity [--calls 26000] [--function NAME] [--number K]``: exit status 1 where anything differs."""

import argparse
import sys

from tests.parity import runner
from tests.parity.draws import FUNCTIONS


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=26_000)
    parser.add_argument("--function", action="append", choices=tuple(FUNCTIONS))
    parser.add_argument("--number", type=int, help="this call of each function alone")
    return runner.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
