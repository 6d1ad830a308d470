"""`python -m svbatch.training RECIPE …` is `svbatch train RECIPE …`, for `accelerate launch -m`."""

import sys

from svbatch.cli import entry

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    entry()
