"""svbatch scan: look at a corpus."""

import logging
import sys
from pathlib import Path

import click


@click.command()
@click.argument("corpus", nargs=-1, required=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default="scan.parquet",
    show_default=True,
    help="The table, a Parquet file; one that is there is replaced.",
)
@click.option("--quiet", is_flag=True, help="Say nothing unless a recording cannot be read.")
def scan(corpus: tuple[str, ...], output: Path, quiet: bool) -> None:
    """Decode every recording of CORPUS, without a model, and say what there is.

    CORPUS is a folder, file or glob, or several. The table has durations, formats, the share of silence, exact
    duplicates, and why a recording cannot be read. Exit code 3 if there is one.

    \b
    Example:  svbatch scan recordings/
              svbatch scan calls/2026-*/ archive.flac --output calls.parquet
    """
    from svbatch.scan import scan as look
    from svbatch.scan import summary

    if quiet:
        logging.getLogger("svbatch").setLevel(logging.WARNING)
    found = look(corpus, Path.cwd(), output, quiet=quiet)
    if not quiet or found.unreadable:
        click.echo(summary(found))
    sys.exit(3 if found.unreadable else 0)
