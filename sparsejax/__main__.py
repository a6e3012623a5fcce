"""`python -m sparsejax`: the command of the same name."""

import sys

from sparsejax.cli import main

if __name__ == "__main__":
    sys.exit(main())
