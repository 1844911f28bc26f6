"""``python -m sparsedsl``: see :mod:`sparsedsl.cli`."""

# PYTHON_ARGCOMPLETE_OK: the mark by which a shell knows that it may ask for completions.
import sys

from sparsedsl.cli import main

if __name__ == "__main__":
    sys.exit(main())
