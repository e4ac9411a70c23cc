"""``python -m cnn_ext`` is ``cnn-ext``."""

import sys

from cnn_ext.mnist.cli import main

if __name__ == "__main__":
    sys.exit(main())
