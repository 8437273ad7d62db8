"""`python -m experiments.triangle_attention`: the training; bench.py is called by its own name."""

import sys

from .train import main

if __name__ == "__main__":
    sys.exit(main())
