"""svbatch run."""

import logging
import sys
from pathlib import Path

import click

from svbatch.job import load_job
from svbatch.run import run as run_job

SHIPPED_JOBS = Path(__file__).parents[1] / "jobs"


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--corpus", multiple=True, help="Recordings instead of the job's: a folder, file or glob.")
@click.option("--output", type=click.Path(path_type=Path), help="A folder for the tables instead of the job's.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where weights are kept (or SVBATCH_CACHE).")
@click.option("--quiet", is_flag=True, help="Say nothing unless something failed.")
def run(job: Path, corpus: tuple[str, ...], output: Path | None, cache: Path | None, quiet: bool) -> None:
    """Answer the tasks of JOB for every recording that has no answers yet.

    JOB is a file, or `quickstart`: the example that is installed with svbatch, whose tables go to out/quickstart.

    \b
    Example:  svbatch run jobs/quickstart.yaml
              svbatch run jobs/quickstart.yaml --corpus calls/ --output out/calls
    """
    if quiet:
        logging.getLogger("svbatch").setLevel(logging.WARNING)
    if not job.exists() and (shipped := SHIPPED_JOBS / f"{job}.yaml").is_file():
        job, output = shipped, output or Path("out") / job
    loaded = load_job(job, corpus=corpus, output=output)
    outcome = run_job(loaded, cache=cache, quiet=quiet)
    if not quiet or outcome.exit_code:
        from svbatch.report import report

        click.echo(report(loaded, outcome))
    sys.exit(outcome.exit_code)
