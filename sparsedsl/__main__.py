"""``python -m sparsedsl``: see :mod:`sparsedsl.cli`."""

import sys

from sparsedsl.cli import main

if __name__ == "__main__":
    sys.exit(main())
