"""The command line: each command reads its options and calls one function.

Exit codes: 0 all answered · 1 a bug, with its traceback · 2 job or usage · 3 finished, some failures · 4 `verify`
found damage · 75 output busy, try again · 130/143 stopped by a signal.
"""

import logging
import signal
import sys
from importlib import import_module

import click

from svbatch.errors import SvbatchError
from svbatch.logs import error_line

COMMANDS = {
    "run": "Answer a job's tasks for every recording that has no answers yet.",
    "scan": "Say what a corpus holds: durations, formats, silence, duplicates, broken files.",
    "tasks": "List, show and check tasks, and write their tables' contracts.",
    "status": "Say what an output holds.",
    "verify": "Read all of an output and say what is damaged.",
    "compact": "Make few files of many, and remove what is left over.",
    "forget": "Remove all that is held of some recordings.",
    "migrate": "Bring tables to the columns of today.",
    "bundle": "List, show, check and fetch models.",
    "train": "Train projector and adapter by a recipe.",
    "evaluate": "Measure a bundle on recordings with known answers.",
    "export": "Export a speech encoder as an ONNX graph.",
    "bench": "Measure how fast a job is answered, and what a question costs.",
    "doctor": "Say what works on this machine, and why not.",
}
MODULES = {
    "run": "run",
    "scan": "corpus",
    "tasks": "tasks",
    "status": "output",
    "verify": "output",
    "compact": "output",
    "forget": "output",
    "migrate": "output",
    "bundle": "model",
    "train": "model",
    "evaluate": "model",
    "export": "model",
    "bench": "run",
    "doctor": "model",
}


class LazyGroup(click.Group):
    """Imports a command when it is used, so that `svbatch --help` loads no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"svbatch.cli.{MODULES[cmd_name]}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup)
@click.version_option(package_name="svbatch")
def main() -> None:
    """Ask every recording of a corpus every question, and leave typed Parquet tables behind.

    \b
    Example:  svbatch run jobs/quickstart.yaml
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("svbatch")
    logger.addHandler(handler)
    click.get_current_context().call_on_close(lambda: logger.removeHandler(handler))
    logger.setLevel(logging.INFO)


def entry() -> None:
    """`svbatch` as the shell calls it: errors of the user are one line, everything else keeps its traceback."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main(standalone_mode=False)
    except SvbatchError as error:
        _say(str(error), error.run_id)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if _has_json_lines():
            _say(error.format_message())
        else:
            error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted; what was committed is kept, and the next run goes on from there")
        sys.exit(130)


def _say(error: str, run_id: str | None = None) -> None:
    click.echo(error_line(error, run_id) if _has_json_lines() else f"svbatch: {error}", err=True)


def _has_json_lines() -> bool:
    """Whether who reads standard error expects the log lines of a run, see svbatch/logs.py."""
    return sys.argv[1:2] == ["run"] and not sys.stderr.isatty()
