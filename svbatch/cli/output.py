"""svbatch status, verify, compact, forget, migrate: look after an output."""

import hashlib
import os
import re
from pathlib import Path

import click

from svbatch.errors import DamageError, OutputError
from svbatch.tables.folder import is_address
from svbatch.tables.store import Store

SHA256 = re.compile("[0-9a-f]{64}")
output_argument = click.argument("output")


@click.command()
@output_argument
def status(output: str) -> None:
    """Say what OUTPUT holds: recordings, tables, failures and the last run.

    OUTPUT is the folder of a job's tables, or an address such as s3://bucket/out.

    \b
    Example:  svbatch status out/
    """
    from svbatch.tables.status import status as figures

    click.echo(figures(Store(_place(output), make=False)))


@click.command()
@output_argument
def verify(output: str) -> None:
    """Read all of OUTPUT and say what is damaged. Changes nothing; exits 4 with a line for each problem.

    Every Parquet file is there, has the bytes (by SHA-256), rows and columns that were committed, and can be read; no
    other file is there; no key is there twice; every recording has the answers that it is listed with; the counts of
    each run add up. After a kill, the last files may have no hash until the next run: their number is said.

    \b
    Example:  svbatch verify out/
    """
    from svbatch.tables.verify import files_without_hash
    from svbatch.tables.verify import verify as problems_of

    store = Store(_place(output), make=False)
    if problems := problems_of(store):
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DamageError("\n".join([f"{output}: {count}", *problems]))
    click.echo(f"{output} is whole")
    if num_files := files_without_hash(store):
        click.echo(f"{num_files} files have no hash to compare with yet; the next run writes it, or `svbatch compact`")


@click.command()
@output_argument
def compact(output: str) -> None:
    """Make few files of many in OUTPUT, and remove what is left over. Exits 75 while a run or shard writes.

    \b
    Example:  svbatch compact out/
    """
    from svbatch.tables.compact import compact as compact_tables

    store = _to_change(output)
    with store.lock():
        for each in compact_tables(store):
            click.echo(f"{each.table:20}{each.before:8} files -> {each.after}")


@click.command()
@output_argument
@click.argument("recordings", nargs=-1, required=True)
@click.option("--unforget", is_flag=True, help="Let RECORDINGS be asked again: their files, or their hashes.")
def forget(output: str, recordings: tuple[str, ...], unforget: bool) -> None:
    """Remove all that OUTPUT holds of RECORDINGS, and never ask them again. Exits 75 while a run or shard writes.

    RECORDINGS are paths, uris as in the tables, or hashes (`recording_id`). The same bytes under another name go too;
    all spans of a recording go with it. What stays is the hash and the time, in the table `forgotten`.

    \b
    Example:  svbatch forget out/ calls/0042.wav
              svbatch forget out/ --unforget calls/0042.wav
    """
    from svbatch.tables.forget import forget as forget_recordings
    from svbatch.tables.forget import unforget as unforget_recordings

    store = _to_change(output)
    with store.lock():
        if unforget:
            unforget_recordings(store.tables, [_hash_of(each) for each in recordings])
            click.echo(f"{len(recordings)} recordings will be asked again by the next run")
            return
        known = set(store.recordings()["uri"].to_pylist())
        found = forget_recordings(store.tables, [_uri_of(each, known) for each in recordings])
    click.echo("\n".join(["forgotten:", *sorted(found.uris)]))
    if not found.recording_ids:
        click.echo("their bytes were never read, so the next run lists them again; remove them from the corpus")


@click.command()
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--output", help="The tables instead of the job's.")
def migrate(job: Path, output: str | None) -> None:
    """Bring the tables of JOB to the columns that this version of svbatch, or a changed task, writes.

    Rows stay where they can. Otherwise the old table stays beside the new one, under a name that is said, and its
    recordings are asked again. Stopped at any moment, it is called again. Exits 75 while a run or shard writes.

    \b
    Example:  svbatch migrate job.yaml
    """
    from svbatch.contract import contract_of
    from svbatch.job import load_job
    from svbatch.tables.migrate import migrate as migrate_tables
    from svbatch.tables.schemas import arrow_schema

    loaded = load_job(job)
    store = _to_change(output or str(loaded.output))
    with store.lock():
        changed = migrate_tables(store, {task.name: arrow_schema(contract_of(task)) for task in loaded.tasks})
    for each in changed:
        aside = f"; its old rows are in {each.aside}, and its recordings will be asked again" if each.aside else ""
        click.echo(f"{each.table} has the new columns{aside}")
    if not changed:
        click.echo("every table has its columns already")


def _place(output: str) -> Path | str:
    return output if is_address(output) else Path(output)


def _to_change(output: str) -> Store:
    """An output that is there."""
    Store(_place(output), make=False)
    return Store(_place(output))


def _uri_of(recording: str, known: set[str]) -> str:
    """What the tables call a recording: a hash or uri as it is, a path by its uri."""
    if recording in known or SHA256.fullmatch(recording) or is_address(recording):
        return recording
    from svbatch.corpus.sources import recording_at

    return recording_at(Path(os.path.abspath(recording))).uri


def _hash_of(recording: str) -> str:
    if SHA256.fullmatch(recording):
        return recording
    try:
        with open(recording, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OutputError(f"{recording}: neither a hash nor a file that can be read ({error.strerror})") from error
