"""svbatch run, bench: answer a job, and measure how fast."""

import sys
from pathlib import Path
from typing import Any

import click

from svbatch.cli.options import Duration, Moment, Shard
from svbatch.job import load_job
from svbatch.lineage import with_lineage
from svbatch.logs import run_lines
from svbatch.plan import Selection
from svbatch.run import Limits, log_failures, new_run_id
from svbatch.run import run as run_job

SHIPPED_JOBS = Path(__file__).parents[1] / "jobs"


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--corpus", multiple=True, help="Recordings instead of the job's: a folder, file, glob, address or manifest."
)
@click.option("--output", help="A folder or address for the tables instead of the job's.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where weights are kept (or SVBATCH_CACHE).")
@click.option("--since", type=Moment(), help="Only recordings modified since: 2026-01-31, or 24h for the last day.")
@click.option("--limit", type=click.IntRange(min=1), help="Ask at most so many recordings.")
@click.option("--shard", type=Shard(), help="Only the i-th of n parts of the corpus, for n machines at once.")
@click.option("--max-runtime", type=Duration(), help="Stop after so long (90s, 30m, 2h); exit 75 if more is left.")
@click.option(
    "--max-failure-rate", type=click.FloatRange(0, 1), default=1.0, help="Give up when more than this failed."
)
@click.option("--retry-failures", is_flag=True, help="Ask again what failed in earlier runs.")
@click.option("--rehash", is_flag=True, help="Read the bytes of unchanged recordings too, and compare.")
@click.option("--dry-run", is_flag=True, help="Say what would be asked, and how long it may take; write nothing.")
@click.option("--metrics", type=click.Path(path_type=Path), help="A Prometheus text file to write at the end.")
@click.option("--quiet", is_flag=True, help="Say nothing unless something failed.")
def run(job: Path, corpus: tuple[str, ...], output: str | None, cache: Path | None, **options: Any) -> None:
    """Answer the tasks of JOB for every recording that has no answers yet.

    JOB is a file, or `quickstart`: the example that is installed with svbatch, whose tables go to out/quickstart.

    \b
    Example:  svbatch run jobs/quickstart.yaml
              svbatch run jobs/quickstart.yaml --corpus calls/ --output out/calls
              svbatch run jobs/nightly.yaml --quiet --max-runtime 6h
    """
    if not job.exists() and (shipped := SHIPPED_JOBS / f"{job}.yaml").is_file():
        job, output = shipped, output or f"out/{job}"
    loaded = load_job(job, corpus=corpus, output=output)
    selection = Selection(**{name: options[name] for name in ("since", "shard", "limit", "rehash")})
    if options["dry_run"]:
        from svbatch.estimate import estimate

        click.echo(estimate(loaded, cache=cache, selection=selection, retry_failures=options["retry_failures"]))
        return
    if options["metrics"]:
        from svbatch.metrics import check_metrics_file, write_metrics

        check_metrics_file(options["metrics"])
    run_id, quiet = new_run_id(), options["quiet"]
    with run_lines(run_id, quiet=quiet):
        outcome = with_lineage(
            loaded,
            run_id,
            lambda: run_job(
                loaded,
                cache=cache,
                quiet=quiet,
                run_id=run_id,
                selection=selection,
                retry_failures=options["retry_failures"],
                limits=Limits(options["max_runtime"], options["max_failure_rate"]),
            ),
        )
        if options["metrics"]:
            write_metrics(options["metrics"], loaded, outcome)
        if quiet:
            log_failures(outcome)
    if not quiet:
        from svbatch.report import report

        click.echo(report(loaded, outcome))
    sys.exit(outcome.exit_code)


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option(
    "--corpus", multiple=True, help="Recordings instead of the job's: a folder, file, glob, address or manifest."
)
@click.option(
    "--repeats",
    default=3,
    show_default=True,
    type=click.IntRange(min=1),
    help="Runs of each number of tasks; medians are given.",
)
@click.option("--cache", type=click.Path(path_type=Path), help="Where weights are kept (or SVBATCH_CACHE).")
def bench(job: Path, corpus: tuple[str, ...], repeats: int, cache: Path | None) -> None:
    """Measure how fast JOB is answered: each part's share, and what each task costs after those before it.

    Every recording is asked, with the job's first task, then its first two, and so on. Nothing is written. On the CPU
    only, for now.

    \b
    Example:  svbatch bench jobs/quickstart.yaml --repeats 1
    """
    from svbatch.bench import bench as measure
    from svbatch.bundle import find_bundle
    from svbatch.fetch import fetch
    from svbatch.model import choose_precision, load_model

    loaded = load_job(job, corpus=corpus)
    bundle = find_bundle(loaded.bundle, cache=cache)
    fetch(bundle)
    precision = choose_precision(loaded.precision, "cpu")
    figures = measure(loaded, load_model(bundle, "cpu", precision), repeats=repeats)
    click.echo(f"{figures.audio_seconds:.0f} s of audio in {precision}, {figures.real_time_factor:.1f} times real time")
    speeds = ", ".join(f"{speed / 1e9:.0f} GFLOP/s {name}" for name, speed in figures.matrix_speeds.items())
    click.echo(f"matrix product: {speeds}; the whole run reaches {figures.of_matrix_speed:.0%} of it")
    click.echo("\npart          share   of the matrix product's speed")
    for part in figures.parts:
        click.echo(f"{part.name:12}{part.share:7.1%}   {_share(part.of_matrix_speed)}")
    click.echo("\ntask               added   times its floor")
    for price in figures.prices:
        floor = "" if price.of_floor is None else f"{price.of_floor:.2f}"
        click.echo(f"{price.task:16}{price.added:8.1%}   {floor}")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
