"""`python -m svbatch` is `svbatch`."""

from svbatch.cli import entry

entry()
